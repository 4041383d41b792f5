"""Errors of the protocol package.

TunefleetError                 anything a person is to read as one line
├── ProtocolError              a peer said something that may not be said
│   ├── MalformedMessage       not JSON, a field missing or out of bounds
│   ├── UnsupportedVersion     another major version of the protocol
│   ├── BadSignature           unsigned, wrongly signed, or signed by somebody else
│   ├── Replayed               older than what was said before, or changed since
│   ├── BadTensors             names, shapes, dtypes or values not those that were announced
│   └── BadChunk               a chunk that its manifest does not know
├── TransportError             the link to the broker
│   ├── BrokerUnreachable      no connection, or none in time; it may come up yet
│   ├── BrokerRefused          a broker is there, and does not let this client in
│   ├── TlsRefused             one side does not take the other's certificate
│   ├── CertificateUnusable    an own certificate or key is missing, expired or not in order
│   └── DeliveryRefused        the broker took the connection but not the message
│       └── MessageTooLarge    it is over the broker's packet limit, and was not sent
└── StateError                 a state folder or key that can't be used, is in use, or is damaged
"""

from __future__ import annotations

import reprlib


class TunefleetError(Exception):
    """Say what was wrong, where, and what to do; the commands print it as one line."""

    exit_code = 1
    """Of a command that it ends."""


class ProtocolError(TunefleetError):
    """A peer sent something that the protocol does not allow."""


class MalformedMessage(ProtocolError):
    """A message that could not be read: not JSON, a field missing or out of bounds."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"malformed message on {where}: {why}")
        self.where = where
        self.why = why


class UnsupportedVersion(ProtocolError):
    """A message of another major version."""

    def __init__(self, theirs: object, ours: int) -> None:
        super().__init__(
            f"the other side speaks protocol version {_brief(theirs)}, "
            f"this program version {ours}; "
            "install the same release of tunefleet on both"
        )


class BadSignature(ProtocolError):
    """A message that is unsigned, wrongly signed, or signed with an unknown key."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"signature refused on {where}: {why}")


class Replayed(ProtocolError):
    """A message that was right once: older than what is known, or other settings for a job."""

    def __init__(self, why: str) -> None:
        super().__init__(f"refused as replayed or rolled back: {why}")


class BadTensors(ProtocolError):
    """Tensor bytes whose names, shapes, dtypes or values are not those that were announced."""


class BadChunk(ProtocolError):
    """A chunk that its manifest does not know: wrong index, length or hash."""


class TransportError(TunefleetError):
    """The link to the broker failed."""


class BrokerUnreachable(TransportError):
    """No broker answered at the address: waiting may help."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(
            f"no MQTT broker at {address} ({why}); start one, or name another with --broker"
        )
        self.address = address
        self.why = why


class BrokerRefused(TransportError):
    """The broker does not let this client in, and waiting does not change that."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(
            f"the broker at {address} does not let this client in ({why}); allow it there, or name "
            "another broker with --broker"
        )
        self.address = address
        self.why = why


class TlsRefused(TransportError):
    """A server whose certificate is not to be trusted, or that does not take ours."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"no secure connection to {address}: {why}")
        self.address = address
        self.why = why


class CertificateUnusable(TransportError):
    """An own certificate or key that is missing, not in order, or not valid now."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"{path} can't be used for TLS: {why}")
        self.path = path
        self.why = why


class DeliveryRefused(TransportError):
    """The broker did not take a message: not authorised, too large, over quota."""

    def __init__(self, topic: str, why: str) -> None:
        super().__init__(f"the broker refused a message on {topic}: {why}")
        self.topic = topic
        self.why = why


class MessageTooLarge(DeliveryRefused):
    """A message over the broker's packet limit; it has not been sent."""

    def __init__(self, topic: str, limit_bytes: int) -> None:
        super().__init__(
            topic, f"it is larger than the broker's packet limit of {limit_bytes} bytes"
        )
        self.limit_bytes = limit_bytes


class StateError(TunefleetError):
    """A state folder or key that can't be used, that another process has, or that is damaged."""


def os_words(error: Exception) -> str:
    """Return what an error says, as one line, without the number that the system gives it.

    >>> os_words(FileNotFoundError(2, "No such file or directory", "job.toml"))
    'No such file or directory: job.toml'
    """
    strerror, file = getattr(error, "strerror", None), getattr(error, "filename", None)
    words = f"{strerror}: {file}" if strerror and file else strerror or str(error).strip()
    return str(words).partition("\n")[0] or type(error).__name__


def _brief(value: object) -> str:
    """Return what somebody sent so that it can be shown: short, not deep, printable."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text[:40] if text.isprintable() else ascii(text[:40])
