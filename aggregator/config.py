"""The job file: what an operator writes to start a fleet, in TOML.

    job = "notes"
    model = "base-tiny"            # or a folder, a hub id, or a description (*.json)
    rule = "anchored"
    rounds = 20

    [training]
    steps = 50

    [policy]
    min_devices = 3
    deadline_s = 3600

A model is described (its hash and target modules) by `edge-client describe`, for that needs torch
and the aggregator has none; on a machine without it, give the description that another wrote.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aggregator.errors import ConfigError
from aggregator.merge import rules
from aggregator.rounds import Policy
from protocol.messages import BaseModelInfo, Job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class PolicySettings(BaseModel):
    """How rounds are run; see aggregator.rounds.Policy."""

    model_config = ConfigDict(extra="forbid")

    min_devices: int = Field(1, ge=1)
    quorum: int = Field(1, ge=1)
    deadline_s: float = Field(3600.0, gt=0)
    fraction: float = Field(1.0, gt=0, le=1)

    def policy(self) -> Policy:
        return Policy(**self.model_dump())


def read_job(path: Path) -> tuple[Job, Policy]:
    """Read a job file: TOML, or JSON where its name ends so.

    Raises:
        ConfigError: it is not there, not TOML, or a field is missing, unknown or wrong.
    """
    read = json.loads if path.suffix == ".json" else tomllib.loads
    try:
        fields = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"can't read the job file {path}: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"the job file {path} is not an object with settings")
    return build_job(fields, str(path))


def build_job(fields: dict[str, Any], where: str) -> tuple[Job, Policy]:
    """Return the job and the policy of a job file's fields.

    Raises:
        ConfigError: a field is missing, unknown or wrong.
    """
    fields = dict(fields)
    unknown = fields.keys() - Job.model_fields.keys() - {"model", "policy"}
    if unknown:
        raise ConfigError(f"{where}: there is no setting {sorted(unknown)[0]!r}")
    try:
        policy = PolicySettings.model_validate(fields.pop("policy", {})).policy()
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error, 'policy')}") from None
    if "model" in fields:
        fields["base"] = describe(str(fields.pop("model")))
    try:
        job = Job.model_validate({"scale": 2.0, **fields})
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error)}") from None
    rules.find_rule(job.rule)
    return job, policy


def describe(model: str) -> BaseModelInfo:
    """Return the description of a model: from a *.json file, or by asking `edge-client describe`.

    Raises:
        ConfigError: neither gave one; says what to do.
    """
    if model.endswith(".json"):
        try:
            return BaseModelInfo.model_validate_json(Path(model).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read the model description {model}: {error}") from None
        except ValidationError as error:
            raise ConfigError(
                f"can't read the model description {model}: {_first(error)}"
            ) from None
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"describing {model!r} needs torch, which the aggregator does without: run "
            f"`edge-client describe {model} > model.json` on a device and give model.json"
        )
    command = [sys.executable, "-m", "edge_client", "describe", model]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        why = answer.stderr.strip().splitlines() or ["edge-client describe failed"]
        raise ConfigError(why[-1].removeprefix("error: "))
    return BaseModelInfo.model_validate(json.loads(answer.stdout))


def _first(error: ValidationError, *within: str) -> str:
    """Return the first thing that was wrong, in one line that begins with the field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in (*within, *first["loc"])) or "job"
    return f"{field}: {first['msg']}"
