"""What a device says of itself: its status, whose last one is its will."""

from __future__ import annotations

from edge_client.config import Settings
from protocol.messages import Status


def make_status(
    settings: Settings,
    job: str,
    boot: int,
    state: str,
    *,
    rank: int = 0,
    version: int | None = None,
    detail: str = "",
) -> Status:
    """Return a device's status; a stopped one is no longer online."""
    return Status.model_validate(
        {
            "job": job,
            "device": settings.name,
            "online": state != "stopped",
            "boot": boot,
            "state": state,
            "profile": settings.profile.name,
            "rank": rank,
            "version": version,
            "detail": detail[:500],
        }
    )
