"""`edge-client install-service`: from the options of `edge-client run` to a unit."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from edge_client.calibrate import cache_folder
from edge_client.config import check_cache, check_name
from edge_client.data.read import check_paths
from edge_client.errors import StorageError
from edge_client.membership import identity, state_folder
from edge_client.policy.owner import find_policy, policy_file
from edge_client.unit import NAME, Service, device_unit
from protocol.files import PRIVATE_UMASK

_NEVER = ("help", "as_json")
"""Options that a service does not take over."""


def make_service(given: Mapping[str, Any], options: Mapping[str, str], host_name: str, *,
                 system: bool) -> tuple[Service, Path]:  # fmt: skip
    """Return the service of a device that is run with such options, and its state folder.

    `given` has the values that are not `run`'s defaults, by the parameters' names, and `options`
    what each is called. They are checked as `run` does, for the owner is here now.

    Raises:
        TunefleetError: one of them can't be.
    """
    name = given.get("name", "")
    check_name(name or host_name)
    state = (given.get("state") or state_folder(name, host_name)).absolute()
    cache = (given.get("cache") or cache_folder()).absolute()
    identity(state, name=name, broker=given.get("broker", ""), default_name=host_name)
    check_paths(given["data"])
    policy = find_policy(state, given.get("policy"))
    found = given.get("policy") or policy_file(state)
    values = {**given, "state": state, "cache": cache, **({"policy": found} if found else {})}
    models = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").absolute()
    return Service(
        arguments=["run", *_arguments(values, options)],
        writes=(state, cache, models),
        policy=policy,
        memory_cap_mib=given.get("memory_cap_mib"),
        user=getpass.getuser() if system else "",
    ), state


def install(service: Service, state: Path) -> list[str]:
    """Make the service's folders, write its unit, and return the commands that start it.

    A user's own unit is written where it is looked for. The system's is written into the state
    folder: to put it where it belongs takes another user.

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
            if one is True:
                words.append(options[name])
            else:
                words += [options[name], str(one.absolute() if isinstance(one, Path) else one)]
    return words
