"""The API's acting half: what an operator may ask of the running aggregator.

Nothing here is done by GET. With the header Idempotency-Key an action that is sent twice, say for
want of an answer, is done once.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Security
from fastapi.security import APIKeyHeader

from aggregator.control import (
    Answer,
    ChangePolicy,
    Command,
    PauseJob,
    ResumeJob,
    Revoke,
    RollBack,
    ask,
)
from aggregator.enrol.folder import FleetFolder
from aggregator.enrolling import enrol as enrol_device
from aggregator.page.answers import NAME, Done, Enrolled, NewDevice, Policy, Problem, Rollback
from aggregator.page.guard import ACTION_HEADER
from aggregator.page.reader import Reader
from protocol.link import in_url

BY = "page"
TIMEOUT_S = 20.0
Name = Annotated[str, Path(pattern=NAME)]
Key = Annotated[str, Header(alias="idempotency-key", pattern=r"^[A-Za-z0-9_-]{0,64}$")]
marked = APIKeyHeader(
    name=ACTION_HEADER,
    scheme_name="action",
    description="`action`; what no other site's page can send. Not needed with the page's token.",
    auto_error=False,
)
PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem} for code in (400, 401, 403, 404, 409, 503)
}


def acting(reader: Reader, fleet: FilePath | None) -> APIRouter:
    """Return the routes; all are POST."""
    routes = APIRouter(
        prefix="/api/v1", responses=PROBLEMS, tags=["act"], dependencies=[Security(marked)]
    )
    _on_jobs(routes, reader)
    _on_devices(routes, reader, fleet)
    return routes


def _on_jobs(routes: APIRouter, reader: Reader) -> None:
    async def tell(job: str, command: Command, key: str) -> Done:
        folder = await reader.ask(lambda fleet: _folder(fleet.jobs().get(job)))
        if folder is None:
            raise HTTPException(404, f"there is no job {job!r} here")
        return await _ask(folder, command, key)

    @routes.post("/jobs/{job}/pause")
    async def pause(job: Name, key: Key = "") -> Done:
        """Open, merge and extend no round; what comes is still counted."""
        return await tell(job, PauseJob(), key)

    @routes.post("/jobs/{job}/resume")
    async def resume(job: Name, key: Key = "") -> Done:
        """Go on; the open round has the time that it had left."""
        return await tell(job, ResumeJob(), key)

    @routes.post("/jobs/{job}/policy")
    async def policy(job: Name, policy: Policy, key: Key = "") -> Done:
        """Change deadline and quorum, and how rounds are run besides."""
        settings = policy.model_dump(exclude={"reset"})
        return await tell(job, ChangePolicy(**settings, reset=tuple(policy.reset)), key)

    @routes.post("/jobs/{job}/rollback")
    async def rollback(job: Name, back: Rollback, key: Key = "") -> Done:
        """Go on from an older version, which becomes the newest."""
        return await tell(job, RollBack(back.version), key)


def _on_devices(routes: APIRouter, reader: Reader, fleet: FilePath | None) -> None:
    def of_fleet() -> None:
        if fleet is None:
            raise HTTPException(
                409,
                "this aggregator serves without a fleet's folder, where anybody takes part: "
                "`aggregator init` makes one, `serve --dir` serves it",
            )

    needs_fleet = [Depends(of_fleet)]

    @routes.post("/devices/enrol", dependencies=needs_fleet)
    async def enrol(new: NewDevice) -> Enrolled:
        """Make a token that lets a device in, once."""
        assert fleet is not None, "it needs a fleet"
        return await asyncio.to_thread(_let_in, FleetFolder(fleet), new)

    @routes.post("/devices/{device}/revoke", dependencies=needs_fleet)
    async def revoke(device: Name, key: Key = "") -> Done:
        """Put a device out of the fleet."""
        return await _ask(reader.root, Revoke(device), key)


def _folder(state: Any) -> FilePath | None:
    return None if state is None else state.folder


def _let_in(fleet: FleetFolder, new: NewDevice) -> Enrolled:
    """Have the daemon let a device in; return its token, and how it is used."""
    now = datetime.now(timezone.utc)
    token = enrol_device(fleet, new.device, hours=new.hours, by=BY, now=now)
    where = f"https://{in_url(fleet.settings.hosts[0])}:{fleet.settings.enrol_port}"
    return Enrolled(
        device=new.device,
        token=str(token),
        expires=now.timestamp() + new.hours * 3600,
        command=f"edge-client join {where} --token {token}",
    )


async def _ask(folder: FilePath, command: Command, key: str) -> Done:
    """Have the daemon do something, and wait for its answer beside everything else."""

    def wait() -> Answer:
        return ask(folder, command, by=BY, timeout_s=TIMEOUT_S, key=key)

    answer = await asyncio.to_thread(wait)
    return Done(said=answer.said, fields=answer.fields)
