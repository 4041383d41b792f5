"""The API's reading half: all that the page shows, as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, HTTPException, Path, Query
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from aggregator.page.answers import LARGEST, NAME, DevicePage, Problem, Trust
from aggregator.page.download import adapter_zip
from aggregator.page.reader import Reader
from aggregator.view import (
    DeviceDetail,
    FleetReader,
    FleetView,
    JobView,
    RoundDevice,
    RoundView,
    StateView,
    VersionView,
)

T = TypeVar("T")
Name = Annotated[str, Path(pattern=NAME)]
Number = Annotated[int, Path(ge=0, le=LARGEST)]
Offset = Annotated[int, Query(ge=0, le=LARGEST)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Order = Literal["name", "state", "rank", "seen", "up", "round"]
MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}


class _Jobs:
    """Ask the views of jobs; what is not there is 404."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    async def ask(self, job: str, question: Callable[[StateView], T | None]) -> T:
        def of_job(fleet: FleetReader) -> T | None:
            state = fleet.jobs().get(job)
            return None if state is None else question(state)

        found = await self.reader.ask(of_job)
        if found is None:
            raise HTTPException(404, f"there is no such thing in job {job!r}, or no such job")
        return found


def reading(reader: Reader) -> APIRouter:
    """Return the routes; all are GET and change nothing."""
    routes = APIRouter(prefix="/api/v1", responses=MISSING, tags=["read"])
    jobs = _Jobs(reader)
    _of_jobs(routes, jobs)
    _of_devices(routes, jobs)
    _of_rounds(routes, jobs)
    _of_versions(routes, jobs)
    return routes


def _of_jobs(routes: APIRouter, jobs: _Jobs) -> None:
    @routes.get("/fleet")
    async def fleet() -> FleetView:
        """Return how all jobs stand."""
        return await jobs.reader.ask(lambda fleet: fleet.fleet())

    @routes.get("/jobs/{job}")
    async def job(job: Name) -> JobView:
        """Return how a job stands."""
        return await jobs.ask(job, lambda state: state.job())

    @routes.get("/jobs/{job}/settings")
    async def settings(job: Name) -> dict[str, Any]:
        """Return a job's settings, as devices are told them."""
        return await jobs.ask(job, lambda state: state.settings())


def _of_devices(routes: APIRouter, jobs: _Jobs) -> None:
    @routes.get("/jobs/{job}/devices")
    async def devices(
        job: Name,
        state: Annotated[str, Query(max_length=63)] = "",
        search: Annotated[str, Query(max_length=63)] = "",
        order: Order = "name",
        descending: bool = False,
        offset: Offset = 0,
        limit: Limit = 100,
    ) -> DevicePage:
        """Return devices of a job, those in a state or with a part of a name."""

        def ask(view: StateView) -> DevicePage:
            page = view.devices(
                state=state,
                search=search,
                order=order,
                descending=descending,
                offset=offset,
                limit=limit,
            )
            return DevicePage(total=view.count(state=state, search=search), devices=page)

        return await jobs.ask(job, ask)

    @routes.get("/jobs/{job}/devices/{device}")
    async def device(job: Name, device: Name, rounds: Limit = 50) -> DeviceDetail:
        """Return all that is known of a device in a job."""
        return await jobs.ask(job, lambda state: state.device(device, rounds))


def _of_rounds(routes: APIRouter, jobs: _Jobs) -> None:
    @routes.get("/jobs/{job}/rounds")
    async def rounds(
        job: Name,
        before: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
        limit: Limit = 100,
    ) -> list[RoundView]:
        """Return a job's rounds, the newest first."""
        return await jobs.ask(job, lambda state: state.rounds(before=before, limit=limit))

    @routes.get("/jobs/{job}/rounds/{number}")
    async def one_round(job: Name, number: Number) -> RoundView:
        """Return a round with its shares."""
        return await jobs.ask(job, lambda state: state.round(number))

    @routes.get("/jobs/{job}/rounds/{number}/devices")
    async def round_devices(
        job: Name, number: Number, offset: Offset = 0, limit: Limit = 100
    ) -> list[RoundDevice]:
        """Return what devices did in a round."""
        return await jobs.ask(
            job, lambda state: state.round_devices(number, offset=offset, limit=limit)
        )

    @routes.get("/jobs/{job}/rounds/{number}/trust")
    async def trust(job: Name, number: Number) -> Trust:
        """Return how a round's devices were mixed, in a job that gives each its own adapter."""

        def ask(state: StateView) -> Trust | None:
            found = state.trust(number)
            return None if found is None else Trust(round=number, **found._asdict())

        return await jobs.ask(job, ask)


def _of_versions(routes: APIRouter, jobs: _Jobs) -> None:
    one_at_a_time = asyncio.Lock()  # an adapter is whole in memory while it is written

    @routes.get("/jobs/{job}/versions")
    async def versions(job: Name) -> list[VersionView]:
        """Return the versions that are kept, the newest first."""
        return await jobs.ask(job, lambda state: state.versions())

    @routes.get(
        "/jobs/{job}/versions/{version}/adapter",
        response_class=FileResponse,
        responses={200: {"content": {"application/zip": {}}}, 507: {"model": Problem}},
    )
    async def adapter(
        job: Name,
        version: Number,
        device: Annotated[str, Query(pattern=f"{NAME}|^$")] = "",
    ) -> FileResponse:
        """Return a version's adapter, or with a device its own one, as a zip of a PEFT folder."""
        state = await jobs.ask(job, lambda state: state.folder)
        name = "-".join(part for part in (job, device, f"v{version}") if part)
        async with one_at_a_time:
            file = await asyncio.to_thread(adapter_zip, state, name, version=version, device=device)
        return FileResponse(
            file,
            filename=f"{name}.zip",
            media_type="application/zip",
            background=BackgroundTask(file.unlink, missing_ok=True),
        )
