"""The page's server: on a thread of `aggregator serve`, which it never holds up."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import uvicorn

from aggregator.errors import ConfigError
from aggregator.page.app import Served, build_app, look_ahead
from aggregator.page.guard import check_exposure, is_loopback
from aggregator.page.live import Watchers
from aggregator.page.past import Past
from protocol.events import EventLog, Seldom

PORT = 8885
CONNECTIONS = 256
IDLE_S = 15
START_S = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Where:
    """Where the page is to be found."""

    host: str = "127.0.0.1"
    port: int = PORT
    """0: a free one."""
    certificate: Path | None = None
    key: Path | None = None

    @property
    def encrypted(self) -> bool:
        return self.certificate is not None


class PageServer:
    """Serve the page for as long as the block lasts."""

    def __init__(self, served: Served, where: Where, events: EventLog) -> None:
        """Take the port.

        Raises:
            ConfigError: it is taken; or others could reach the page, and it has no token or no TLS.
        """
        check_exposure(where.host, token=served.token, encrypted=where.encrypted)
        self._where = where
        self._socket = _listen(where.host, where.port)
        self.port: int = self._socket.getsockname()[1]
        self._watchers: Watchers | None = None
        self._complaints = _Complaints(Seldom(events))
        self._served = served
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)

    @property
    def url(self) -> str:
        """Return where a browser on this computer finds it."""
        scheme = "https" if self._where.encrypted else "http"
        host = "localhost" if is_loopback(self._where.host) else self._where.host
        return f"{scheme}://{host}:{self.port}"

    def __enter__(self) -> PageServer:
        log = logging.getLogger("uvicorn.error")
        log.propagate = False
        log.addHandler(self._complaints)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while self._server is None or not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ConfigError(f"the page did not start on port {self.port}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(5)
        logging.getLogger("uvicorn.error").removeHandler(self._complaints)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        watchers, past = Watchers(), Past()
        self._server = uvicorn.Server(
            uvicorn.Config(
                build_app(self._served, watchers, past),
                ssl_certfile=self._where.certificate,
                ssl_keyfile=self._where.key,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=IDLE_S,
                timeout_graceful_shutdown=1,
            )
        )
        letting_go = asyncio.create_task(_let_go(self._server, watchers))
        looking = asyncio.create_task(self._served.reader.ask(partial(look_ahead, past)))
        await self._server.serve([self._socket])
        letting_go.cancel()
        await looking


async def _let_go(server: uvicorn.Server, watchers: Watchers) -> None:
    """Send home who watches when the server is to end, or it would wait for them."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    watchers.end()


class _Complaints(logging.Handler):
    """Turn what the library has to say of requests into events."""

    def __init__(self, seldom: Seldom) -> None:
        super().__init__(logging.WARNING)
        self._seldom = seldom

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage().strip().splitlines() or [""]
        error = record.exc_info[1] if record.exc_info else None
        why = f"a mistake in the page: {error!r}" if error else said[0]
        self._seldom.emit(("page", why[:80]), "page", reason=why[:400])


def names_of(host: str) -> tuple[str, ...]:
    """Return the names that a page on a host of this computer may be asked for by."""
    return (*LOOPBACK, host.strip("[]"))


def _listen(host: str, port: int) -> socket.socket:
    """Listen on one address.

    Raises:
        ConfigError: it is taken, or not this computer's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise ConfigError(
            f"can't show the page on {host}, port {port}: {error.strerror or error}; name another "
            "with --page PORT"
        ) from None
