"""Messages between the agent and its training process.

An adapter can be as large as what training it takes, so its arrays travel apart from the pickled
rest (pickle protocol 5, PEP 574): at no time does an end hold them a second time as pickled bytes.
"""

from __future__ import annotations

import os
import pickle
from multiprocessing.connection import Connection
from typing import Any


def send(connection: Connection, value: Any) -> None:
    """Send a value, then the memory of its arrays, one message each."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    connection.send((rest, len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def ask(connection: Connection, value: Any) -> bool:
    """Send a value and return the answer; who asks ends if there is nobody to answer."""
    try:
        send(connection, value)
        return bool(receive(connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)


def receive(connection: Connection) -> Any:
    """Receive what `send` sent.

    Raises:
        EOFError: the other end has gone.
    """
    rest, count = connection.recv()
    return pickle.loads(rest, buffers=[bytearray(connection.recv_bytes()) for _ in range(count)])
