"""Whom a device believes: the aggregator whose key it saw first."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TypeVar

from edge_client.errors import StorageError
from edge_client.storage import keeping
from protocol.files import write_durably
from protocol.messages import Message
from protocol.signing import open_message
from protocol.transport import Incoming

M = TypeVar("M", bound=Message)
FILE = "aggregator.pub"
KEY_BYTES = 32


def trusted_key(state: Path) -> str | None:
    """Return the key of the aggregator that this device believes, in base64; None: any, so far.

    Raises:
        StorageError: the file is damaged, or can't be read.
    """
    path = state / FILE
    try:
        key = path.read_text().strip()
        whole = len(base64.b64decode(key, validate=True)) == KEY_BYTES
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from None
    except ValueError:
        whole = False
    if not whole:
        raise StorageError(
            f"{path} is damaged: it holds no key of an aggregator; bring it back from a backup, or "
            "remove it: then the aggregator that is heard next is trusted (who has joined a fleet "
            "with a token joins again)"
        )
    return key


def open_trusted(incoming: Incoming, model: type[M], state: Path) -> M:
    """Read a message of the aggregator, whose key is remembered in `state` from the first one on.

    Raises:
        ProtocolError: it is malformed, or another key has signed it.
        StorageError: the key can't be read, or not be kept.
    """
    trusted = trusted_key(state)
    message, key = open_message(incoming.payload, incoming.topic, model, trusted=trusted)
    if trusted is None:
        with keeping(FILE, state):
            write_durably(state / FILE, key.encode())
    return message
