"""The job files of a running daemon, read again: what may change, and what may not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aggregator.config import build_job, check_settings, read_fields
from aggregator.errors import ConfigError
from aggregator.rounds import Policy
from protocol.messages import Job


@dataclass(frozen=True, slots=True)
class JobFile:
    """A job file as it was read."""

    path: Path
    fields: Mapping[str, Any]
    policy: Policy

    @property
    def job(self) -> str:
        return str(self.fields["job"])


@dataclass(frozen=True, slots=True)
class Reread:
    """What a job file says now."""

    file: JobFile
    changed: dict[str, Any]
    """Settings of the policy that are others now: they hold at once."""
    refused: tuple[str, ...]
    """Settings that are others too, and can't be while the job is served."""


def open_job_file(path: Path) -> tuple[Job, JobFile]:
    """Read a job file, and describe its model.

    Raises:
        ConfigError: it is not there, not TOML, or a field is missing, unknown or wrong.
    """
    fields = read_fields(path)
    job, policy = build_job(fields, str(path))
    return job, JobFile(path, fields, policy)


def reread(known: JobFile) -> Reread:
    """Read a job file again; its model is not described again.

    Raises:
        ConfigError: as `open_job_file`.
    """
    fields = read_fields(known.path)
    _, policy = check_settings(fields, str(known.path))
    if fields.get("job") != known.job:
        raise ConfigError(
            f"{known.path}: job: it was {known.job!r} and is {fields.get('job')!r} now: another "
            "job needs a file of its own"
        )
    before = asdict(known.policy)
    changed = {k: v for k, v in asdict(policy).items() if v != before[k]}
    others = {*fields, *known.fields} - {"policy"}
    refused = sorted(k for k in others if fields.get(k) != known.fields.get(k))
    kept = JobFile(known.path, {**known.fields, "policy": fields.get("policy", {})}, policy)
    return Reread(kept, changed, tuple(refused))
