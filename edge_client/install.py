"""`edge-client install-service`: from the options of `edge-client run` to a unit."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Any

from edge_client.backends import missing_torch
from edge_client.config import Settings, check_cache
from edge_client.errors import StorageError
from edge_client.model import find_model
from edge_client.policy.owner import policy_file
from edge_client.surroundings import FILE as SECRETS
from edge_client.surroundings import as_file, surroundings
from edge_client.unit import NAME, Service, device_unit
from protocol.files import PRIVATE, PRIVATE_UMASK, write_durably

_NEVER = ("help", "as_json")
"""Options that a service does not take over."""


def make_service(
    settings: Settings, given: Mapping[str, Any], options: Mapping[str, str], *, system: bool
) -> tuple[Service, Path]:
    """Return the service of a device that is run with such settings, and its state folder.

    `given` has the values that are not `run`'s defaults, by the parameters' names, and `options`
    what each is called. A model that is named is looked for, for the owner is here now.

    Raises:
        ModelError: the model is not there, nor to be had.
    """
    if settings.model and settings.backend != "onnx" and not missing_torch():
        find_model(settings.model)
    state, cache = settings.state.absolute(), settings.cache.absolute()
    policy = given.get("policy") or policy_file(state)
    values = {**given, "state": state, "cache": cache, **({"policy": policy} if policy else {})}
    models = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").absolute()
    environment, secret = surroundings(os.environ)
    return Service(
        arguments=["run", *_arguments(values, options)],
        writes=(state, cache, models),
        policy=settings.policy,
        memory_cap_mib=settings.memory_cap_mib,
        user=getpass.getuser() if system else "",
        environment=environment,
        secrets=state / SECRETS if secret else None,
    ), state


def install(service: Service, state: Path) -> list[str]:
    """Make the service's folders, write its unit, and return the commands that start it.

    Variables that nobody else may read are written into a file beside the state. A user's own unit
    is written where it is looked for. The system's is written into the state folder: to put it
    where it belongs takes another user.

    Raises:
        StorageError: it can't be written.
    """
    folder = state if service.user else _user_units()
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
        (folder / NAME).write_text(device_unit(service))
    except OSError as error:
        raise StorageError(
            f"can't write {error.filename or folder / NAME}: {error.strerror}; see the unit with "
            "--print, and put it there yourself"
        ) from None
    if service.user:
        return [
            f"sudo cp {quote(str(folder / NAME))} /etc/systemd/system/",
            "sudo systemctl daemon-reload",
            f"sudo systemctl enable --now {NAME}",
        ]
    return [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {NAME}",
        f"sudo loginctl enable-linger {quote(getpass.getuser())}  # also while nobody is logged in",
    ]


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
