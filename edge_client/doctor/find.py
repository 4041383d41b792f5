"""Find a device as `run` would, and go on where `run` would end: what is damaged is a finding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edge_client.config import check_memory_cap, check_name, default_state
from edge_client.doctor import Patient
from edge_client.errors import ConfigError
from edge_client.membership import identity, join_begun, state_folder, tls_files
from edge_client.policy.owner import Policy, find_policy
from protocol.errors import TransportError
from protocol.transport import BrokerAddress


def find_patient(
    *,
    name: str,
    host_name: str,
    state: Path | None,
    broker: str,
    policy: Path | None,
    cache: Path,
    data: tuple[Path, ...],
    model: str,
    memory_cap_mib: float | None,
) -> Patient:
    """Return the device that these options of `run` are about.

    Raises:
        ConfigError: an option itself is wrong.
        TransportError: `broker` is not an address.
    """
    check_name(name or host_name)
    check_memory_cap(memory_cap_mib)
    found = Patient(
        name=name or host_name,
        state=state or default_state(host_name),
        cache=cache,
        broker=BrokerAddress.parse(broker or "mqtt://127.0.0.1:1883"),
        tls=None,
        data=data,
        model=model,
        memory_cap_mib=memory_cap_mib,
        policy=Policy(),
    )
    try:
        folder = state or state_folder(name, host_name)
        device, address, tls = identity(folder, name=name, broker=broker, default_name=host_name)
        found = replace(found, name=device, state=folder, broker=address, tls=tls)
    except (ConfigError, TransportError) as error:
        tls = tls_files(found.state) if join_begun(found.state) else None
        found = replace(found, tls=tls, bad_membership=str(error))
    try:
        return replace(found, policy=find_policy(found.state, policy))
    except ConfigError as error:
        return replace(found, bad_policy=str(error))
