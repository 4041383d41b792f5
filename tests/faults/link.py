"""A bad link: a TCP proxy that is slow, goes silent, or hangs up after some bytes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import TracebackType

PIECE_BYTES = 16 * 1024


class BadLink:
    """Carry connections to a broker's port; how badly may be changed at any time.

    It runs in a thread of its own. `up` is what clients send.
    """

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self.delay_s = 0.0
        """Time that each piece takes on its way, either way."""
        self.bytes_per_s = float("inf")
        """Of each connection, either way."""
        self.cut_at: int | None = None
        """Hang up when this many more bytes have gone up, once."""
        self.bytes_up = 0
        self.cuts = 0
        self.port = 0
        self._ready = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def go_silent(self) -> None:
        """Pass nothing on any more of the connections there are, as if the other end were gone."""
        self._loop.call_soon_threadsafe(lambda: self._silent.update(self._writers))

    def hang_up(self) -> None:
        """End every connection there is."""
        self._loop.call_soon_threadsafe(self._hang_up)

    def wait_for_up(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until so many bytes have gone up in all."""
        deadline = time.monotonic() + timeout_s
        while self.bytes_up < count:
            assert time.monotonic() < deadline, f"only {self.bytes_up} of {count} bytes went up"
            time.sleep(0.002)

    def __enter__(self) -> BadLink:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._hang_up()
        await server.wait_closed()
        while self._writers:
            await asyncio.sleep(0.01)

    def _hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, back}
        self._writers |= both
        try:
            await asyncio.gather(
                self._pass_on(reader, back, up=True), self._pass_on(there, writer, up=False)
            )
        finally:
            for one in both:
                one.transport.abort()
            self._writers -= both
            self._silent -= both

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while piece := await reader.read(PIECE_BYTES):
                if up:
                    self.bytes_up += len(piece)
                    piece = self._cut(piece)
                wait = self.delay_s + len(piece) / self.bytes_per_s
                if wait:
                    await asyncio.sleep(wait)
                if writer not in self._silent:
                    writer.write(piece)
                    await writer.drain()
                if up and self.cut_at == 0:
                    self.cut_at, self.cuts = None, self.cuts + 1
                    break
        writer.transport.abort()

    def _cut(self, piece: bytes) -> bytes:
        """Return what of a piece still goes through before the link is cut."""
        if self.cut_at is None:
            return piece
        piece = piece[: self.cut_at]
        self.cut_at -= len(piece)
        return piece
