"""Whether the aggregator lives, and whether it can do its work: for whoever restarts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import APIRouter
from starlette.responses import JSONResponse

STUCK_S = 120.0
"""Without progress of its loop for so long, the aggregator is taken for dead; a merge may take its
time, and tells of each module."""


@dataclass(frozen=True, slots=True)
class Health:
    """How the aggregator does."""

    since_progress_s: float = 0.0
    """Since its loop last came round."""
    connected: dict[str, bool] = field(default_factory=dict)
    """Job → whether its broker is there."""

    @property
    def live(self) -> bool:
        return self.since_progress_s < STUCK_S

    @property
    def ready(self) -> bool:
        return self.live and bool(self.connected) and all(self.connected.values())


def health_routes(health: Callable[[], Health]) -> APIRouter:
    """Return the two addresses that systemd, Docker or Kubernetes may ask."""
    routes = APIRouter(prefix="/health", tags=["health"])

    @routes.get("/live", responses={503: {}})
    async def live() -> JSONResponse:
        """Say whether the aggregator's loop goes on."""
        now = health()
        return JSONResponse({"live": now.live}, 200 if now.live else 503)

    @routes.get("/ready", responses={503: {}})
    async def ready() -> JSONResponse:
        """Say whether it serves its jobs: alive, and connected to its broker."""
        now = health()
        return JSONResponse({"ready": now.ready}, 200 if now.ready else 503)

    return routes
