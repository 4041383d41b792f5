"""A job to plan for without a fleet: a job file, or a base model and the defaults."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edge_client.errors import ConfigError
from edge_client.model import BASE_TINY, describe_model
from protocol.messages import BaseModelInfo, Job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLANNED = ("job", "scale", "ladder", "remainder", "directions", "layers", "training", "seed")
"""Settings of a job file that a plan depends on; the aggregator checks the others."""
STAND_IN = {"name": "any", "sha256": "0" * 64, "parameters": 1, "modules": {"any": (1, 1)}}


def planned_job(file: Path | None, model: str, training: dict[str, int]) -> tuple[Job, str]:
    """Return the job to plan for, and where its base model is on this device.

    `training` settings go before those of the job file. The base is `model` where that is given,
    else the file's, else base-tiny.

    Raises:
        ConfigError: the file can't be read, or a setting is wrong; says which.
        ModelError: the model can't be had.
    """
    fields = _read(file) if file else {}
    where = f"the job file {file}" if file else "the job"
    wanted = {name: fields[name] for name in PLANNED if name in fields}
    own = wanted.get("training", {})
    if not isinstance(own, dict):
        raise ConfigError(f"{where}: training is not a table of settings")
    wanted = {"job": "plan", "scale": 2.0, **wanted, "training": {**own, **training}}
    try:
        job = Job.model_validate({**wanted, "base": STAND_IN})  # which takes long to describe
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error)}") from None
    named = model or str(fields.get("model", BASE_TINY))
    base = _base(named)
    return job.model_copy(update={"base": base}), base.name if named.endswith(".json") else named


def _base(model: str) -> BaseModelInfo:
    if not model.endswith(".json"):
        return describe_model(model)
    try:
        return BaseModelInfo.model_validate_json(Path(model).read_bytes())
    except (OSError, ValidationError) as error:
        words = _first(error) if isinstance(error, ValidationError) else error.strerror
        raise ConfigError(f"can't read the model description {model}: {words}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes().decode("utf-8")
        found = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"can't read the job file {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        words = str(error).splitlines()[0]
        raise ConfigError(f"can't read the job file {file}: {words}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"the job file {file} is not an object with settings")
    return found


def _first(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    return f"{field}: {fault['msg']}" if field else fault["msg"]
