"""From the options of `edge-client run` to the settings of an agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from device_profiles.schema import load_profile
from edge_client.backends import check_backend
from edge_client.calibrate import cache_folder
from edge_client.config import Settings, check_name
from edge_client.data.read import check_paths
from edge_client.membership import identity, state_folder
from edge_client.policy.owner import find_policy
from edge_client.profile import measure_profile

_AS_GIVEN = (
    "job", "model", "memory_cap_mib", "memory_scale", "threads", "seed", "exit_when_done",
    "compare_alone", "private_rank", "train_blocks", "onnx", "system_root",
)  # fmt: skip


def read_options(given: Mapping[str, Any], host_name: str) -> Settings:
    """Return the settings that all of `run`'s options, by its parameters' names, come to.

    They are checked as far as they can be without a job; nothing is written.

    Raises:
        TunefleetError: one of them can't be; says which.
    """
    name = given["name"]
    check_name(name or host_name)
    state = given["state"] or state_folder(name, host_name)
    device, address, tls = identity(
        state, name=name, broker=given["broker"], default_name=host_name
    )
    profile = given["profile"]
    found = load_profile(profile) if profile else measure_profile()
    check_paths(given["data"])  # found out later only after minutes of measuring
    check_backend(given["backend"].value, given["onnx"], may_fetch=True)
    return Settings(
        name=device,
        broker=address,
        tls=tls,
        data=tuple(given["data"]),
        state=state,
        cache=given["cache"] or cache_folder(),
        profile=found,
        wait_for_broker=not given["no_wait"],
        policy=find_policy(state, given["policy"]),
        checkpoint_s=given["checkpoint_every"],
        backend=given["backend"].value,
        **{option: given[option] for option in _AS_GIVEN},
    )
