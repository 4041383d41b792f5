"""What has changed on a page since it was loaded, as server-sent events.

A page is rendered again when the database has changed, at most once a second, and once every few
seconds in any case, for what only time changes; once for all who watch the same. Only fragments
that have changed are sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import dataclass

from starlette.responses import StreamingResponse

from aggregator.page.page import Page

EVERY_S = 1.0
ANYWAY_S = 5.0
WATCHERS = 64
"""At once; who comes beside them sees the page as it was loaded."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a live page is made of."""

    name: str
    """The same for who watches the same."""
    page: Callable[[], Awaitable[Page]]
    stamp: Callable[[], Awaitable[Hashable]]
    """What is another value when the database has changed."""


class Watchers:
    """Count who watches, and let all go when the server ends."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self.watching = 0
        self._ended = asyncio.Event()
        self._seen: dict[str, tuple[float, asyncio.Future[tuple[Hashable, Page]]]] = {}
        """Name of a source → when it was looked at, and what was seen: its stamp, and the page."""

    def end(self) -> None:
        """Let go of everybody; called on the server's own loop."""
        self._ended.set()

    def stream(self, source: Source) -> StreamingResponse | None:
        """Return the events of a page; None where too many watch already."""
        if self.watching >= WATCHERS:
            return None
        return StreamingResponse(self._events(source), media_type="text/event-stream")

    async def _events(self, source: Source) -> AsyncIterator[bytes]:
        self.watching += 1
        try:
            yield b"retry: 2000\n\n"
            sent: dict[str, str] = {}
            async for page in self._pages(source):
                now = {id: str(html) for id, html in page.fragments.items()}
                changed = {id: html for id, html in now.items() if sent.get(id) != html}
                sent |= changed
                yield _event("page", {"title": page.title, "fragments": changed})
        finally:
            self.watching -= 1

    async def _pages(self, source: Source) -> AsyncIterator[Page]:
        """Yield a page when it may have changed; each is a sign of life too."""
        while True:
            stamp, page = await self._look(source)
            yield page
            for _ in range(max(1, round(ANYWAY_S / self._every_s))):
                if await self._wait():
                    return
                if await source.stamp() != stamp:
                    break

    async def _look(self, source: Source) -> tuple[Hashable, Page]:
        """Return a page with the stamp that it had, seen now or by another a moment ago."""
        now = asyncio.get_running_loop().time()
        fresh = now - self._every_s / 2
        self._seen = {name: seen for name, seen in self._seen.items() if seen[0] > fresh}
        if source.name not in self._seen:
            self._seen[source.name] = now, asyncio.ensure_future(_seen_now(source))
        return await asyncio.shield(self._seen[source.name][1])

    async def _wait(self) -> bool:
        """Wait a moment; return True when the server ends."""
        try:
            await asyncio.wait_for(self._ended.wait(), self._every_s)
        except asyncio.TimeoutError:
            return False
        return True


async def _seen_now(source: Source) -> tuple[Hashable, Page]:
    stamp = await source.stamp()
    return stamp, await source.page()


def _event(kind: str, value: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()
