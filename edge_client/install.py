"""`edge-client install-service`: from the options of `edge-client run` to a unit."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Any

from edge_client.backends import missing_torch
from edge_client.config import Settings, check_cache
from edge_client.errors import ConfigError, StorageError
from edge_client.model import find_model
from edge_client.policy.owner import policy_file
from edge_client.surroundings import CACHES, as_file, surroundings
from edge_client.surroundings import FILE as SECRETS
from edge_client.unit import NAME, Service, device_unit, hidden_folder
from protocol.files import PRIVATE, PRIVATE_UMASK, write_durably
from protocol.systemd import argument

SYSTEM_UNITS = Path("/etc/systemd/system")
_NEVER = ("help", "as_json")
"""Options that a service does not take over."""


def make_service(
    settings: Settings,
    given: Mapping[str, Any],
    options: Mapping[str, str],
    *,
    system: bool,
    default_name: str,
) -> tuple[Service, Path]:
    """Return the service of a device that is run with such settings, and its state folder.

    `given` has the values that are not `run`'s defaults, by the parameters' names, and `options`
    what each is called. A model that is named is looked for, for the owner is here now. A device
    that has another name than `default_name` from its owner has a unit of that name.

    Raises:
        ModelError: the model is not there, nor to be had.
    """
    if settings.model and settings.backend != "onnx" and not missing_torch():
        find_model(settings.model)
    state, cache = settings.state.absolute(), settings.cache.absolute()
    policy = given.get("policy") or policy_file(state)
    values = {**given, "state": state, "cache": cache, **({"policy": policy} if policy else {})}
    environment, secret = surroundings(os.environ)
    caches = [Path(environment[name]) for name in CACHES if name in environment]
    name = given.get("name") or default_name
    return Service(
        arguments=["run", *_arguments(values, options)],
        writes=(state, cache, *(caches or [Path.home() / ".cache" / "huggingface"])),
        policy=settings.policy,
        memory_cap_mib=settings.memory_cap_mib,
        user=getpass.getuser() if system else "",
        environment=environment,
        secrets=state / SECRETS if secret else None,
        name=NAME if name == default_name else f"{Path(NAME).stem}-{name}.service",
    ), state


def not_found_by(service: Service, given: Mapping[str, Any]) -> str:
    """Say which folder or file the service would not find, though it is there; empty: none."""
    hidden = hidden_folder(service, [*service.writes, *_paths(given)])
    if hidden is None:
        return ""
    return (
        f"{hidden} is below a folder for temporary files, of which a service of the system sees "
        "an empty one of its own (PrivateTmp): it would not find it; name another place"
    )


def _paths(values: Mapping[str, Any]) -> Iterator[Path]:
    for name, value in values.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Path) or (name == "model" and Path(one).exists()):
                yield Path(one).absolute()


def install(service: Service, state: Path) -> list[str]:
    """Make the service's folders, write its unit, and return the commands that start it.

    Variables that nobody else may read are written into a file beside the state. A user's own unit
    is written where it is looked for. The system's is written into the state folder: to put it
    where it belongs takes another user.

    Raises:
        ConfigError: a unit of that name runs another device.
        StorageError: it can't be written.
    """
    folder = state if service.user else _user_units()
    _refuse_another(service.name, SYSTEM_UNITS if service.user else folder, state)
    try:
        umask = os.umask(PRIVATE_UMASK)
        try:
            for path in service.writes:
                path.mkdir(parents=True, exist_ok=True)
        finally:
            os.umask(umask)
        check_cache(service.writes[1])
        if service.secrets:
            write_durably(service.secrets, as_file(surroundings(os.environ)[1]), mode=PRIVATE)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / service.name, device_unit(service).encode())
    except OSError as error:
        raise StorageError(
            f"can't write {error.filename or folder / service.name}: {error.strerror}; see the "
            "unit with --print, and put it there yourself"
        ) from None
    if service.user:
        return [
            f"sudo cp {quote(str(folder / service.name))} /etc/systemd/system/",
            "sudo systemctl daemon-reload",
            f"sudo systemctl enable --now {service.name}",
        ]
    return [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {service.name}",
        f"sudo loginctl enable-linger {quote(getpass.getuser())}  # also while nobody is logged in",
    ]


def _refuse_another(name: str, folder: Path, state: Path) -> None:
    """Refuse to put a unit over that of a device with another state folder."""
    try:
        text = (folder / name).read_text()
    except (OSError, ValueError):
        return  # there is none, or writing says why
    if f'"--state" {argument(state)}' in text:
        return
    other = re.search(r'"--state" "((?:[^"\\]|\\.)*)"', text)
    whose = f"the device with its state in {other[1]}" if other else "another device"
    raise ConfigError(
        f"{folder / name} is the unit of {whose}; give this device a --name of its own, by which "
        "its unit is called then, or remove that unit"
    )


def _user_units() -> Path:
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "systemd" / "user"


def _arguments(values: Mapping[str, Any], options: Mapping[str, str]) -> list[str]:
    """Return options as they are written, with absolute paths."""
    words: list[str] = []
    for name, value in values.items():
        if name in _NEVER:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if name == "model" and Path(one).exists():
                one = Path(one)
            if isinstance(one, Enum):
                one = one.value
            if one is True:
                words.append(options[name])
            else:
                words += [options[name], str(one.absolute() if isinstance(one, Path) else one)]
    return words
