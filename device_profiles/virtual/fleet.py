"""Which device of a replay has which trace, profile and fidelity: drawn from the seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from device_profiles.errors import ReplayError
from device_profiles.schema import DeviceProfile, bundled_names, load_profile
from device_profiles.traces.format import Trace
from device_profiles.virtual.device import Fidelity

DEFAULT_FIDELITY: Fidelity = "recorded"


@dataclass(frozen=True, slots=True)
class Part:
    """One device's part in a replay."""

    name: str
    trace: Trace
    offset_s: float
    """Where in its trace the replay begins."""
    profile: DeviceProfile
    fidelity: Fidelity


def cast(
    traces: Sequence[Trace],
    devices: int,
    seed: int,
    fidelities: Mapping[Fidelity, int],
    *,
    spread: bool = False,
) -> list[Part]:
    """Give each device its part.

    Where there are traces enough each device has one of its own, from its start. Otherwise they are
    drawn, and begin anywhere: two devices of one trace are not alike. `spread` has all begin
    anywhere. A trace that names no profile gets one that is drawn.

    Raises:
        ReplayError: a trace names a profile that this program has not.
    """
    draw = random.Random(f"{seed}|cast")
    known = {name: load_profile(name) for name in bundled_names()}
    for trace in traces:
        if trace.profile is not None and trace.profile not in known:
            raise ReplayError(
                f"trace {trace.name!r} is of the profile {trace.profile!r}, which is none of "
                f"{', '.join(known)}; write one of them, or null to have one drawn"
            )
    names = list(known)
    found = []
    each_its_own = devices <= len(traces) and not spread
    for index in range(devices):
        trace = traces[index] if each_its_own else draw.choice(traces)
        offset_s = 0.0 if each_its_own else draw.uniform(0, trace.duration_s)
        profile = known[trace.profile or draw.choice(names)]
        fidelity = _nth(fidelities, index)
        name = f"{fidelity}-{index:05d}"
        found.append(Part(name, trace, offset_s, profile, fidelity))
    return found


def parse_fidelities(text: str, devices: int) -> dict[Fidelity, int]:
    """Read `train=20,recorded=480,headless=500`; who is in none of them is recorded.

    Raises:
        ReplayError: it is not so written, or has more devices than there are.
    """
    found: dict[Fidelity, int] = {}
    known: tuple[Fidelity, ...] = get_args(Fidelity)
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, count = part.partition("=")
        kind = next((k for k in known if k == name.strip()), None)
        if kind is None or not count.strip().isdigit() or kind in found:
            raise ReplayError(
                f"--fidelity {text!r}: write each of {', '.join(known)} once at most, with a "
                "number: train=20,recorded=480,headless=500"
            )
        found[kind] = int(count)
    given = sum(found.values())
    if given > devices:
        raise ReplayError(f"--fidelity {text!r}: {given} devices are more than --devices {devices}")
    found[DEFAULT_FIDELITY] = found.get(DEFAULT_FIDELITY, 0) + devices - given
    return {kind: found[kind] for kind in known if found.get(kind)}


def _nth(fidelities: Mapping[Fidelity, int], index: int) -> Fidelity:
    for kind, count in fidelities.items():
        if index < count:
            return kind
        index -= count
    return DEFAULT_FIDELITY
