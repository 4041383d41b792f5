"""The application: pages, their live half, the API, metrics and health, behind the guard."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from aggregator.errors import ControlRefused, ExportError, NoDaemon, StoreError
from aggregator.page.acting import acting
from aggregator.page.asked import Asked
from aggregator.page.device import device_page, jobs_page
from aggregator.page.guard import Guard, Sessions
from aggregator.page.health import Health, health_routes
from aggregator.page.job import Around, job_page
from aggregator.page.live import Source, Watchers
from aggregator.page.page import Page, html_of, sorry
from aggregator.page.past import Past
from aggregator.page.reader import Reader
from aggregator.page.reading import reading
from aggregator.page.render import HERE, render
from aggregator.page.sessions import session_routes
from aggregator.view import FleetReader
from protocol.errors import TunefleetError

MOST = 2**53
"""Devices that a fleet may have, and more."""
REFUSED = {"wrong": 400, "unknown": 404, "state": 409, "late": 503, "failed": 500}
"""Code of a refused command → the HTTP status."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the page is of, and whom it lets in."""

    reader: Reader
    fleet: Path | None = None
    """The fleet's folder, which lets devices in and puts them out; None: there is none."""
    token: str = ""
    encrypted: bool = False
    hosts: Sequence[str] | None = None
    """Names that the page is asked for by; None: any."""
    health: Callable[[], Health] = Health
    metrics: Callable[[FleetReader, str], tuple[bytes, str]] | None = None
    """From what the asker accepts to what Prometheus reads, and its content type."""


def build_app(served: Served, watchers: Watchers, past: Past) -> ASGIApp:
    """Return the whole application; `past` is what its pages remember."""
    sessions = Sessions()
    app = FastAPI(
        title="Tunefleet",
        summary="What an aggregator does, and what it may be asked to do.",
        version="1",
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )
    _add_pages(app, _Pages(served, watchers, past))
    app.include_router(reading(served.reader))
    app.include_router(acting(served.reader, served.fleet))
    app.include_router(session_routes(served.token, sessions, encrypted=served.encrypted))
    app.include_router(health_routes(served.health))
    _metrics(app, served)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    _errors(app)
    return Guard(app, token=served.token, sessions=sessions, hosts=served.hosts)


class _Pages:
    """Make pages, and answer with them."""

    def __init__(self, served: Served, watchers: Watchers, past: Past) -> None:
        self.reader = served.reader
        self._has_fleet, self._has_token = served.fleet is not None, bool(served.token)
        self._watchers, self.past = watchers, past

    async def answer(
        self, request: Request, make: Callable[[FleetReader], Page], job: str | None
    ) -> Response:
        """Return a page, or, to who asks for events, what changes on it."""

        async def page() -> Page:
            try:
                return await self.reader.ask(make)
            except StoreError as error:
                return sorry(503, "The state can't be read now", str(error))

        if "text/event-stream" in request.headers.get("accept", ""):
            stamp = partial(self.reader.ask, partial(_stamp, job))
            source = Source(f"{request.url.path}?{request.url.query}", page, stamp)
            stream = self._watchers.stream(source)
            return stream or JSONResponse({"detail": "too many watch already"}, 429)
        made = await page()
        return HTMLResponse(html_of(made, session=self._has_token), made.status)

    def around(self, fleet: FleetReader) -> Around:
        return Around(self._has_fleet, list(fleet.jobs()))

    def job(self, name: str, asked: Asked, fleet: FleetReader) -> Page:
        state = fleet.jobs().get(name)
        if state is None:
            why = "; ".join(fleet.fleet().unreadable.values()) or "Its name may be misspelt."
            return sorry(404, f"There is no job {name!r} here", why)
        return job_page(state, self.past, asked, self.around(fleet))

    def device(self, job: str, name: str, fleet: FleetReader) -> Page:
        state = fleet.jobs().get(job)
        page = state and device_page(state, self.past, name, self.around(fleet))
        words = f"There is no device {name!r} in job {job!r}"
        return page or sorry(404, words, "It may not have been heard of yet.")


def _add_pages(app: FastAPI, pages: _Pages) -> None:
    reader = pages.reader

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> Response:
        seen = await reader.ask(FleetReader.fleet)
        if len(seen.jobs) == 1 and not seen.unreadable:
            return RedirectResponse(f"/jobs/{seen.jobs[0].name}", 303)
        root = str(reader.root)
        return await pages.answer(request, lambda fleet: jobs_page(fleet.fleet(), root), None)

    @app.get("/jobs/{job}", include_in_schema=False)
    async def job(request: Request, job: str) -> Response:
        asked = Asked.read(request.query_params)
        return await pages.answer(request, partial(pages.job, job, asked), job)

    @app.get("/jobs/{job}/devices/at/{index}", include_in_schema=False)
    async def device_at(job: str, index: int) -> Response:
        """Lead to the device at a place of the map."""

        def find(fleet: FleetReader) -> str:
            state = fleet.jobs().get(job)
            found = state.devices(offset=index, limit=1) if state and 0 <= index < MOST else []
            return found[0].name if found else ""

        name = await reader.ask(find)
        return RedirectResponse(f"/jobs/{job}/devices/{name}" if name else f"/jobs/{job}", 303)

    @app.get("/jobs/{job}/devices/{device}", include_in_schema=False)
    async def device(request: Request, job: str, device: str) -> Response:
        return await pages.answer(request, partial(pages.device, job, device), job)

    @app.get("/login", include_in_schema=False)
    async def login() -> Response:
        return HTMLResponse(render("login.html"))


def look_ahead(past: Past, fleet: FleetReader) -> None:
    """Read what has ended before anybody asks for it: of a large fleet it takes its time."""
    for state in fleet.jobs().values():
        with suppress(StoreError):  # who asks for it is told
            job_page(state, past, Asked(), Around())


def _stamp(job: str | None, fleet: FleetReader) -> Hashable:
    """Return what changes with what a job's page shows; of all jobs without a name."""
    jobs = fleet.jobs()
    with suppress(StoreError):  # the page says so
        return tuple(state.stamp() for name, state in jobs.items() if job in (None, name))
    return None


def _metrics(app: FastAPI, served: Served) -> None:
    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        expose, accept = served.metrics, request.headers.get("accept", "")
        if expose is None:
            return JSONResponse({"detail": "metrics need the package prometheus-client"}, 404)
        data, kind = await served.reader.ask(lambda fleet: expose(fleet, accept))
        return Response(data, headers={"content-type": kind})


def _errors(app: FastAPI) -> None:
    """Answer what goes wrong: in JSON to programs, on a page to people."""

    def say(request: Request, status: int, why: str) -> Response:
        if request.url.path.startswith("/api/") or "text/html" not in request.headers.get(
            "accept", ""
        ):
            return JSONResponse({"detail": why}, status)
        return HTMLResponse(html_of(sorry(status, "That did not work", why)), status)

    async def refused(request: Request, error: Exception) -> Response:
        status = REFUSED.get(error.code, 409) if isinstance(error, ControlRefused) else 503
        return say(request, status, str(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return say(request, error.status_code, str(error.detail))

    async def other(request: Request, error: Exception) -> Response:
        kinds = ((ExportError, 507), (StoreError, 404))  # what is damaged is not there
        status = next((code for kind, code in kinds if isinstance(error, kind)), 409)
        return say(request, status, str(error))

    app.add_exception_handler(ControlRefused, refused)
    app.add_exception_handler(NoDaemon, refused)
    app.add_exception_handler(TunefleetError, other)
    app.add_exception_handler(HTTPException, http)
