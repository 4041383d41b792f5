"""Whom a device believes: the aggregator whose key it saw first."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from edge_client.storage import keeping
from protocol.files import write_durably
from protocol.messages import Message
from protocol.signing import open_message
from protocol.transport import Incoming

M = TypeVar("M", bound=Message)


def open_trusted(incoming: Incoming, model: type[M], state: Path) -> M:
    """Read a message of the aggregator, whose key is remembered in `state` from the first one on.

    Raises:
        ProtocolError: it is malformed, or another key has signed it.
    """
    path = state / "aggregator.pub"
    trusted = path.read_text() if path.exists() else None
    message, key = open_message(incoming.payload, incoming.topic, model, trusted=trusted)
    if trusted is None:
        with keeping(path.name, state):
            write_durably(path, key.encode())
    return message
