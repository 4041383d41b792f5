"""How the daemon is set up: flags before environment before a file in TOML.

    broker = "mqtt://broker.example:1883"
    jobs = ["notes.toml", "letters.toml"]

    [log]
    level = "info"

Paths in the file are from its folder. In the environment a setting is TUNEFLEET_ and its name, with
two underscores between a table and what is in it: TUNEFLEET_LOG__LEVEL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from aggregator.errors import ConfigError
from protocol.errors import TunefleetError
from protocol.link import BrokerAddress
from protocol.mistakes import first_mistake, setting_name, unknown_setting
from protocol.settings_file import line_of, read_settings

PREFIX, NESTED = "TUNEFLEET_", "__"
PATHS = (
    "dir", "state", "key", "onnx",
    "page.token_file", "page.certificate", "page.certificate_key", "tracking.folder",
)  # fmt: skip
LISTS = ("jobs", "tracking.sinks")
WHAT = "settings"
FLAGS = {"wait_for_broker": "--no-wait", "page.port": "--page"}
"""Settings whose flag has another name."""
DEFAULT_STATE = Path("aggregator-state")


class LogSettings(BaseModel):
    """What is told of what the daemon does, and how."""

    model_config = ConfigDict(frozen=True)

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "plain", "json"] = "auto"


class PageSettings(BaseModel):
    """Where the live page, its API and /metrics are, and who may see them."""

    model_config = ConfigDict(frozen=True)

    port: int | None = Field(None, ge=0, le=65535)
    """None: there is no page."""
    host: str = "127.0.0.1"
    token_file: Path | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None


class TrackingSettings(BaseModel):
    """Which trackers of experiments are told of rounds, beside the JSON Lines."""

    model_config = ConfigDict(frozen=True)

    sinks: list[Literal["jsonl", "tensorboard", "wandb", "mlflow"]] = []
    folder: Path | None = None
    """Where they write; a folder for each job is made in it."""
    wandb_mode: Literal["offline", "online"] = "offline"
    wandb_project: str = "tunefleet"
    mlflow_uri: str = ""
    mlflow_experiment: str = "tunefleet"


class ServeSettings(BaseSettings):
    """All settings of `aggregator serve -c`; `docs/operator.md` says what each is for."""

    model_config = SettingsConfigDict(frozen=True, env_prefix=PREFIX, env_nested_delimiter=NESTED)

    dir: Path | None = None
    jobs: list[Path] = []
    state: Path | None = None
    broker: str = ""
    port: int = Field(1883, ge=0, le=65535)
    key: Path | None = None
    enroll_port: int | None = Field(None, ge=0, le=65535)
    onnx: Path | None = None
    engine: Literal["plain", "ray"] = "plain"
    shared_intake: bool = False
    exit_when_done: bool = False
    wait_for_broker: bool = True
    page: PageSettings = PageSettings()
    tracking: TrackingSettings = TrackingSettings()
    log: LogSettings = LogSettings()

    @field_validator("broker")
    @classmethod
    def _check_broker(cls, broker: str) -> str:
        try:
            if broker:
                BrokerAddress.parse(broker)
        except TunefleetError as error:
            raise ValueError(str(error)) from None
        return broker

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[Any, ...]:
        """Take what `read` has put together alone: it knows where each value is from."""
        return (sources["init_settings"],)


@dataclass(frozen=True, slots=True)
class Effective:
    """The settings that are in force, and where each comes from."""

    settings: ServeSettings
    file: Path | None
    sources: Mapping[str, str]
    """Setting, with dots, → "flag", a variable, a file with its line; "default" for all others."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Flags, so that the file can be read again with the same."""

    def source(self, setting: str) -> str:
        return self.sources.get(setting, "default")

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self.file.parent if self.file is not None else Path()


def read(file: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Effective:
    """Return what flags (None: not given), environment and file come to.

    Raises:
        ConfigError: names the file and line, the variable or the flag; what was found, and what
            is allowed.
    """
    text, from_file = _from_file(file)
    layers = [
        ("flag", {name: value for name, value in flags.items() if value is not None}),
        ("environment", _from_environment(environ)),
        ("file", from_file),
    ]
    sources: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for layer, fields in layers:
        for name, value in _flat(fields).items():
            table = name.partition(".")[0]  # what is set in its place is no table, and is told so
            if name not in sources and table not in sources:
                sources[name] = _where(layer, name, file, text)
                _put(merged, name, value)
    try:
        settings = ServeSettings(**merged)
    except ValidationError as error:
        raise ConfigError(_mistake(error, sources)) from None
    return Effective(_check(settings, sources), file, sources, dict(flags))


def _from_file(file: Path | None) -> tuple[str, dict[str, Any]]:
    if file is None:
        return "", {}
    fields = read_settings(file, WHAT, ConfigError)
    text = file.read_text("utf-8-sig")
    if unknown := unknown_setting(fields, known_settings()):
        where = line_of(text, _first_unknown(fields))
        raise ConfigError(f"{file}{f', line {where}' if where else ''}: {unknown}")
    for name in PATHS:
        table, _, key = name.rpartition(".")
        place = fields.get(table) if table else fields
        if isinstance(place, dict) and isinstance(place.get(key), str):
            place[key] = str(_from(file.parent, place[key]))
    if isinstance(fields.get("jobs"), list):
        fields["jobs"] = [
            str(_from(file.parent, job)) if isinstance(job, str) else job for job in fields["jobs"]
        ]
    return text, fields


def _from(folder: Path, path: str) -> Path:
    return folder / Path(path).expanduser()


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what the environment sets.

    Raises:
        ConfigError: a list is not written as JSON has it, or a table has no such setting. A name
            without a table may be another command's.
    """
    for name, value in environ.items():
        if name.startswith(PREFIX) and value:
            _check_variable(name, value)
    source = EnvSettingsSource(ServeSettings)
    source.env_vars = {name.lower(): value for name, value in environ.items() if value}
    try:
        found = source()
    except SettingsError as error:
        raise ConfigError(f"the environment: {error}; write a table as JSON has it") from None
    return {name: value for name, value in found.items() if name in ServeSettings.model_fields}


def _check_variable(name: str, value: str) -> None:
    """Refuse a variable of a table that has no such setting, or of a list that is none."""
    table, nested, key = name.removeprefix(PREFIX).lower().partition(NESTED)
    tables = known_settings()
    if nested and (wrong := unknown_setting({table: {key: None}}, tables)):
        raise ConfigError(f"{name}: {wrong}")
    if nested and table not in tables:
        raise ConfigError(
            f"{name}: {table!r} is no table; there are {', '.join(filter(None, tables))}"
        )
    if f"{table}.{key}".rstrip(".") in LISTS:
        try:
            json.loads(value)
        except ValueError:
            raise ConfigError(
                f"{name}: write a list as JSON has it, say [{json.dumps(value)}]"
            ) from None


def known_settings() -> dict[str, list[str]]:
    """Return the names of the settings in each table; those at the top under ""."""
    tables: dict[str, list[str]] = {"": [*ServeSettings.model_fields]}
    for name, info in ServeSettings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            tables[name] = [*info.annotation.model_fields]
    return tables


def _first_unknown(fields: Mapping[str, Any]) -> list[str]:
    known = known_settings()
    for table, names in known.items():
        given = fields.get(table) if table else fields
        for name in given if isinstance(given, Mapping) else ():
            if name not in names:
                return [table, name] if table else [name]
    return []


def _flat(fields: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    tables = known_settings()
    for name, value in fields.items():
        if isinstance(value, Mapping) and not within and name in tables:
            flat |= _flat(value, f"{name}.")
        else:
            flat[f"{within}{name}"] = value
    return flat


def flat_values(settings: ServeSettings) -> dict[str, Any]:
    """Return all settings by their names, with dots, as JSON has their values."""
    return _flat(settings.model_dump(mode="json"))


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    table, _, key = name.rpartition(".")
    (fields.setdefault(table, {}) if table else fields)[key] = value


def _where(layer: str, name: str, file: Path | None, text: str) -> str:
    if layer == "flag":
        return FLAGS.get(name, f"--{name.replace('_', '-').replace('.', '-')}")
    if layer == "environment":
        return PREFIX + name.replace(".", NESTED).upper()
    line = line_of(text, name.split("."))
    return f"{file}, line {line}" if line else str(file)


def _mistake(error: ValidationError, sources: Mapping[str, str]) -> str:
    """Return the first mistake, and where it was made."""
    name = setting_name(error.errors(include_url=False)[0]["loc"])
    known = [key for key in sources if name == key or name.startswith((f"{key}.", f"{key}["))]
    where = f"{sources[known[0]]}: " if known else ""
    return where + first_mistake(error)


def _check(settings: ServeSettings, sources: Mapping[str, str]) -> ServeSettings:
    """Refuse settings that can't be together.

    Raises:
        ConfigError: says which.
    """
    if settings.dir is None and settings.enroll_port is not None:
        raise ConfigError(f"{sources['enroll_port']}: enrolment needs the fleet's folder: --dir")
    if settings.dir is not None and settings.key is not None:
        raise ConfigError(
            f"{sources['key']}: a fleet has a key of its own: leave --key (TUNEFLEET_KEY) out with "
            "--dir"
        )
    if settings.shared_intake and (settings.dir is not None or not settings.broker):
        raise ConfigError(
            f"{sources['shared_intake']}: sharing uploads needs a broker that shares "
            "subscriptions, named with --broker; in a fleet's folder (--dir) the aggregator's one "
            "certificate allows one connection"
        )
    return settings
