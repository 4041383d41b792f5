"""A job to plan for without a fleet: a job file, or a base model and the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edge_client.errors import ConfigError
from edge_client.model import BASE_TINY, describe_model
from protocol.messages import BaseModelInfo, Job, job_tables
from protocol.mistakes import first_mistake, unknown_setting
from protocol.settings_file import read_settings

PLANNED = (
    "job", "scale", "ladder", "remainder", "directions", "layers", "training", "seed",
    "encoding_up", "encoding_down",
)  # fmt: skip
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
        raise ConfigError(f"{where}: training: must be a table of settings")
    wanted = {"job": "plan", "scale": 2.0, **wanted, "training": {**own, **training}}
    try:
        job = Job.model_validate({**wanted, "base": STAND_IN})  # which takes long to describe
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_mistake(error)}") from None
    named = model or fields.get("model") or BASE_TINY
    base = _base(named)
    return job.model_copy(update={"base": base}), base.name if named.endswith(".json") else named


def _base(model: str) -> BaseModelInfo:
    if not model.endswith(".json"):
        return describe_model(model)
    fields = read_settings(Path(model), "model description", ConfigError)
    try:
        return BaseModelInfo.model_validate(fields)
    except ValidationError as error:
        words = first_mistake(error)
        raise ConfigError(f"can't read the model description {model}: {words}") from None


def _read(file: Path) -> Mapping[str, Any]:
    """Read a job file, and refuse a setting that there is not.

    What stands in `policy` and `probe` is left to the aggregator.
    """
    fields = read_settings(file, "job file", ConfigError)
    tables = {"": ["model", "policy", *Job.model_fields], **job_tables()}
    if unknown := unknown_setting(fields, tables):
        raise ConfigError(f"the job file {file}: {unknown}")
    if not isinstance(fields.get("model", ""), str):
        raise ConfigError(f"the job file {file}: model: must be text, not {fields['model']!r}")
    return fields
