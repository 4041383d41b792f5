"""A web server on a thread of its own beside the aggregator's work: of enrolment, of the live page.

Others may reach it. It holds so many connections at once, those too that say nothing, and what its
library has to say of requests becomes events.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from aggregator.errors import ConfigError

Own = TypeVar("Own", bound="WebServer")
START_S = 10.0
LOG = "uvicorn.error"
Beside = Callable[[uvicorn.Server], Sequence[Coroutine[Any, Any, object]]]
"""What goes on beside a server for as long as it serves."""
Complain = Callable[[str, BaseException | None], None]
"""Is told in the library's words what went wrong with a request, and the error, if it was one."""


class Door(socket.socket):
    """A listening socket that hangs up where too many connections of it are open.

    The library counts requests: a connection that says nothing is none, and has a file descriptor
    all the same, which the aggregator needs for its files.
    """

    def __init__(self, listening: socket.socket, most: int) -> None:
        super().__init__(fileno=listening.detach())
        self.most = most
        self._open: list[socket.socket] = []

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: none is waiting, or it has been hung up on.
        """
        connection, address = super().accept()
        self._open = [one for one in self._open if one.fileno() >= 0]
        if len(self._open) >= self.most:
            connection.close()
            raise BlockingIOError(errno.EAGAIN, "too many connections")
        self._open.append(connection)
        return connection, address


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a server shows over TLS: PEM files."""

    certificate: Path
    key: Path


class WebServer:
    """Serve an application for as long as the block lasts."""

    def __init__(
        self,
        name: str,
        app: ASGIApp,
        door: Door,
        complain: Complain,
        *,
        certificate: Certificate | None = None,
        idle_s: int,
        beside: Beside = lambda _: (),
    ) -> None:
        """Prepare; `name` is what it is of, in messages."""
        self.port: int = door.getsockname()[1]
        self._name, self._door, self._beside = name, door, beside
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                ssl_certfile=certificate.certificate if certificate else None,
                ssl_keyfile=certificate.key if certificate else None,
                log_config=None,
                access_log=False,
                loop="asyncio",  # `Door` is asked for each connection
                lifespan="off",
                ws="none",
                server_header=False,
                limit_concurrency=door.most,
                timeout_keep_alive=idle_s,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._complaints = _Complaints(self._thread, complain)

    def __enter__(self: Own) -> Own:
        log = logging.getLogger(LOG)
        log.propagate = False
        log.addHandler(self._complaints)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ConfigError(f"the {self._name} did not start on port {self.port}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        logging.getLogger(LOG).removeHandler(self._complaints)
        self._door.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        tasks = [asyncio.create_task(one) for one in self._beside(self._server)]
        await self._server.serve([self._door])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Complaints(logging.Handler):
    """Pass on what the library has to say on the thread of one server: all have the same log."""

    def __init__(self, thread: threading.Thread, complain: Complain) -> None:
        super().__init__(logging.WARNING)
        self._thread, self._complain = thread, complain

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread.ident:
            error = record.exc_info[1] if record.exc_info else None
            self._complain(" ".join(record.getMessage().split()), error)
