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

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from aggregator.edge import ask_edge
from aggregator.errors import BadRuleSettings, ConfigError, MergeError, UnknownRule
from aggregator.merge.installed import Foreign
from aggregator.merge.rule import Rule
from aggregator.merge.rules import find_rule
from aggregator.personal import STRATEGIES, Strategy, read_trust_settings, strategy_of
from aggregator.probe_text import with_probe_text
from aggregator.publish import VERSIONS_KEPT
from aggregator.rounds import Policy
from protocol.messages import BaseModelInfo, Job, Probe, job_tables
from protocol.mistakes import first_mistake, unknown_setting
from protocol.settings_file import read_settings

STAND_IN = {"name": "any", "sha256": "0" * 64, "parameters": 1, "modules": {"any": (1, 1)}}
"""A base in the place of one that is not described yet."""


class PolicySettings(BaseModel, strict=True):
    """How rounds are run; see aggregator.rounds.Policy."""

    min_devices: int = Field(1, ge=1, le=1_000_000)
    quorum: int = Field(1, ge=1, le=1_000_000)
    deadline_s: float = Field(3600.0, gt=0, le=1e9)
    fraction: float = Field(1.0, gt=0, le=1)
    quarantine_after: int = Field(5, ge=1, le=1_000_000)
    quarantine_s: float = Field(3600.0, ge=0, le=1e9)
    keep_versions: int = Field(10, ge=0, le=1_000_000)
    late_updates: int = Field(0, ge=0, le=1_000_000)
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer: int | None = Field(None, ge=1, le=1_000_000)
    max_staleness: int | None = Field(None, ge=0, le=1_000_000)

    @field_validator("keep_versions")
    @classmethod
    def _check(cls, kept: int) -> int:
        if 0 < kept < VERSIONS_KEPT:
            raise ValueError(
                f"0 (all), or {VERSIONS_KEPT} and more: devices may still be downloading the "
                "version before the newest"
            )
        return kept

    @model_validator(mode="after")
    def _check_late(self) -> PolicySettings:
        if 0 < self.keep_versions <= self.late_updates:
            raise ValueError(
                f"late_updates = {self.late_updates} needs keep_versions = "
                f"{self.late_updates + 1} at least, or 0 (all): the versions that late updates "
                "start from"
            )
        return self

    @model_validator(mode="after")
    def _check_buffer(self) -> PolicySettings:
        if self.mode == "synchronous":
            for name in ("buffer", "max_staleness"):
                if getattr(self, name) is not None:
                    raise ValueError(f'{name} needs mode = "buffered"')
            return self
        if self.buffer is None:
            raise ValueError('mode = "buffered" needs buffer, the updates after which it merges')
        if self.late_updates:
            raise ValueError(
                'late_updates is of synchronous rounds; with mode = "buffered" say max_staleness'
            )
        if self.quorum > self.buffer:
            raise ValueError(
                f"quorum = {self.quorum} is more than buffer = {self.buffer}, after which a round "
                "is merged"
            )
        if 0 < self.keep_versions <= (most := self.policy().max_staleness):
            raise ValueError(
                f"max_staleness = {most} needs keep_versions = {most + 1} at least, or 0 (all): "
                "the versions that updates start from"
            )
        return self

    def policy(self) -> Policy:
        fields = self.model_dump(exclude={"mode"}, exclude_none=True)
        return Policy(**fields)

    @staticmethod
    def of(policy: Policy) -> dict[str, Any]:
        """Return the settings that come to a policy."""
        fields = asdict(policy)
        if policy.buffer:
            return {**fields, "mode": "buffered"}
        return {k: v for k, v in fields.items() if k not in ("buffer", "max_staleness")}


def read_job(path: Path) -> tuple[Job, Policy]:
    """Read a job file: TOML, or JSON where its name ends so.

    Raises:
        ConfigError: it is not there, not TOML, or a field is missing, unknown or wrong.
    """
    return build_job(read_fields(path), str(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Return what a job file sets, with its probe's text, unchecked.

    Raises:
        ConfigError: it is not there, or not TOML.
    """
    return with_probe_text(read_settings(path, "job file", ConfigError), path.parent, str(path))


def build_job(fields: Mapping[str, Any], where: str) -> tuple[Job, Policy]:
    """Return the job and the policy of a job file's fields; its model is described last.

    Raises:
        ConfigError: a field is missing, unknown or wrong.
    """
    job, policy = check_settings(fields, where)
    if fields.get("model") is not None:
        job = job.model_copy(update={"base": describe(str(fields["model"]))})
    return job, policy


def check_settings(fields: Mapping[str, Any], where: str) -> tuple[Job, Policy]:
    """Check all of a job file's fields that can be without its model, for that takes its time.

    Returns the job, with a stand-in for its base where that is named by `model`, and the policy.

    Raises:
        ConfigError: a field is missing, unknown or wrong.
    """
    fields = dict(fields)
    if unknown := unknown_setting(fields, known_settings()):
        raise ConfigError(f"{where}: {unknown}")
    try:
        policy = PolicySettings.model_validate(fields.pop("policy", {})).policy()
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_mistake(error, 'policy')}") from None
    if fields.pop("model", None) is not None:
        fields["base"] = STAND_IN
    try:
        job = Job.model_validate({"scale": 2.0, **fields})
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_mistake(error)}") from None
    try:
        strategy = strategy_of(job.rule)
        if strategy is not None:
            read_trust_settings(job.rule_settings)
            _check_personal(strategy, job, policy, where)
            return job, policy
        rule = find_rule(job.rule)
        if isinstance(rule, Rule | Foreign):
            rule.read(job.rule_settings)
    except UnknownRule as error:
        error = UnknownRule(error.name, [*error.known, *STRATEGIES])
        raise ConfigError(f"{where}: rule: {error}") from None
    except BadRuleSettings as error:
        raise ConfigError(f"{where}: rule_settings: {error}") from None
    except MergeError as error:  # another package's rule
        raise ConfigError(f"{where}: {error.why}") from None
    return job, policy


def _check_personal(strategy: Strategy, job: Job, policy: Policy, where: str) -> None:
    """Refuse a job for personal adapters that can't come to any.

    Raises:
        ConfigError: says which setting to change.
    """
    if policy.buffer:
        raise ConfigError(
            f'{where}: rule {strategy!r} needs policy.mode = "synchronous": it compares '
            "devices of one round, which all start from one version"
        )
    if job.remainder == "dropped":
        raise ConfigError(
            f"{where}: rule {strategy!r} needs remainder = 'frozen': what is mixed are whole "
            "adapters, and a device that dropped what it does not train has not trained beside it"
        )
    if strategy == "trust-predictions" and job.probe is None:
        raise ConfigError(
            f"{where}: rule {strategy!r} needs a public text that all devices predict: [probe] "
            'with file = "probe.txt", or text'
        )


def known_settings() -> dict[str, list[str]]:
    """Return the names of the settings in each table of a job file; those at the top under ""."""
    tables = {
        "": ["model", "policy", *Job.model_fields],
        "policy": [*PolicySettings.model_fields],
        "probe": [*Probe.model_fields, "file"],
    }
    return tables | job_tables()


def describe(model: str) -> BaseModelInfo:
    """Return the description of a model: from a *.json file, or by asking `edge-client describe`.

    Raises:
        ConfigError: neither gave one; says what to do.
    """
    if not model.isprintable():  # no name of a file, nor fit for a command's arguments
        raise ConfigError(f"{model!a} is not the name of a model")
    if model.endswith(".json"):
        try:
            return BaseModelInfo.model_validate(
                read_settings(Path(model), "model description", ConfigError)
            )
        except ValidationError as error:
            raise ConfigError(
                f"can't read the model description {model}: {first_mistake(error)}"
            ) from None
    description = ask_edge(
        "describe",
        model,
        otherwise=f"describing {model!r} needs torch, which the aggregator does without: run "
        f"`edge-client describe {model} > model.json` on a device and give model.json",
    )
    return BaseModelInfo.model_validate(json.loads(description))
