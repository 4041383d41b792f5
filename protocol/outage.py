"""Lost connections: why one is not made again, and whether two programs push each other off."""

from __future__ import annotations

import socket
import ssl

from protocol.errors import TransportError
from protocol.link import BrokerAddress
from protocol.tls import PATIENCE_S, refusal, socket_words

SESSION_TAKEN_OVER = 0x8E
"""MQTT 5's reason for hanging up on a client whose id another one connects with."""
FIRST_S, THEN_S = 5.0, 60.0
"""How long a connection is away before somebody asks why, and from then on between two askings."""
SHORT_S = 10.0
"""A connection that is lost so soon was not worth much."""
SHORT_ONES = 5
"""So many short connections in a row, and somebody pushes this client off."""
TAKEOVERS = 3
"""So often, without a longer connection in between, the broker may say that somebody did.

The first time may be an error of the other's, who ends when it sees whose name it has taken.
"""
_TAKEN_OVER = "another program has connected to {broker} as {client}"
_HANGS_UP = (
    "{broker} hangs up on {client} again and again, as it does when another connects so, or when "
    "its memory_limit is reached (its log says so)"
)


class Outages:
    """Count the connections of one client that were lost. Times are seconds on one clock."""

    def __init__(self) -> None:
        self._made = self._ask_next = 0.0
        self._short = self._taken = 0

    def made(self, now: float) -> None:
        """Note a connection."""
        self._made = now

    def lost(self, now: float, taken_over: bool) -> None:
        """Note that it was lost; `taken_over`: the broker said that somebody else connected so."""
        short = now - self._made < SHORT_S
        self._short = self._short + 1 if short else 0
        self._taken = (self._taken if short else 0) + taken_over
        self._ask_next = now + FIRST_S

    def settled(self, now: float) -> bool:
        """Say whether the last connection was made so long ago that it is no short one."""
        return now - self._made >= SHORT_S

    @property
    def contested(self) -> str:
        """Return why coming back is of no use, with {broker} and {client}; else an empty text."""
        if self._taken >= TAKEOVERS:
            return _TAKEN_OVER
        return _HANGS_UP if self._short >= SHORT_ONES else ""

    def check(self, broker: BrokerAddress, client_id: str) -> None:
        """Go on unless coming back is of no use.

        Raises:
            TransportError: the connection is contested.
        """
        if why := self.contested:
            raise TransportError(
                f"{why.format(broker=broker, client=repr(client_id))}; only one may connect by a "
                "name: end the other, or give one of them another name"
            )

    def due(self, now: float) -> bool:
        """Say whether it is time to ask why there is no connection; asked once, it is not."""
        if now < self._ask_next:
            return False
        self._ask_next = now + THEN_S
        return True


def why_away(address: BrokerAddress, context: ssl.SSLContext | None) -> tuple[str, bool]:
    """Connect once more, without MQTT; return why that fails, and whether a certificate is why.

    The text is empty where it does not fail.
    """
    if context is not None and (words := refusal(address.host, address.port, context)):
        return words, True
    try:
        socket.create_connection((address.host, address.port), PATIENCE_S).close()
    except OSError as error:
        return socket_words(error, address.host), False
    return "", False
