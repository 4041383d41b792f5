"""The demo's fleet: merge rules against training alone and against all text in one place.

    python -m benchmarks.quality [--quick] [--seeds 0 1 2]

The demo's six texts and ranks, in one process. Every arm sees the same tokens. Each has the
learning rate of RATES with which it does best on the trust split; the table shows the held-out
split, in nats a token, as the mean over devices.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from base_tiny import PATH
from benchmarks.claims import Claim, write_claims
from benchmarks.simulation import SimulatedDevice, Simulation
from device_profiles.demo_text import write_demo_text
from device_profiles.fleet import DEMO_DEVICES, for_rule, merge_settings
from device_profiles.replay import DEMO_TRAINING
from edge_client.data import read_examples, split_examples
from protocol.messages import Job

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
RANKS = {
    "pi-3b-plus": 4,
    "pi-4b-2gb": 32,
    "pi-4b-4gb": 64,
    "pi-5": 64,
    "jetson-nano": 64,
    "laptop": 64,
}
"""What the planner chooses in a demo run."""
RULES = ("anchored", "hetlora", "flexlora")
Losses = tuple[float, float]
"""Of the trust split and of the held-out split."""


def demo_simulation(seed: int) -> Simulation:
    """Return the demo's fleet."""
    folder = Path(tempfile.mkdtemp(prefix="tunefleet-"))
    write_demo_text(folder, seed=seed)
    devices = []
    for name, _, part in DEMO_DEVICES:
        splits = split_examples(read_examples([folder / part]).examples, seed=seed)
        devices.append(SimulatedDevice(name, RANKS[name], 64, splits))
    return Simulation(PATH, devices, seed=seed)


def arms(fleet: Simulation) -> dict[str, Callable[[float], Losses]]:
    """Return each arm as a function of its learning rate."""

    def job(rate: float, rule: str = "anchored") -> Job:
        fields, _ = for_rule({"rule": rule, "training": {**DEMO_TRAINING, "learning_rate": rate}})
        return fleet.job(**merge_settings({}, fields))

    def federated(rule: str) -> Callable[[float], Losses]:
        def run(rate: float) -> Losses:
            return fleet.losses(fleet.federated(job(rate, rule)))

        return run

    def alone(rate: float) -> Losses:
        adapters = [(fleet.alone(job(rate), device), device) for device in fleet.devices]
        trust, held_out = (
            fmean(fleet.loss(adapter, device, split) for adapter, device in adapters)
            for split in ("trust", "held_out")
        )
        return trust, held_out

    return {
        "local only": alone,
        "all text in one place": lambda rate: fleet.losses(fleet.pooled(job(rate))),
        **{rule: federated(rule) for rule in RULES},
    }


def best(arm: Callable[[float], Losses], rates: Sequence[float]) -> tuple[float, float]:
    """Return the learning rate that is best on the trust split, and its held-out loss."""
    (_, held_out), rate = min((arm(rate), rate) for rate in rates)
    return rate, held_out


def run(seeds: Sequence[int], *, quick: bool) -> None:
    """Run the arms and write what came of them; quick: one seed, one learning rate."""
    rates = (2e-3,) if quick else RATES
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds[:1] if quick else seeds:
        fleet = demo_simulation(seed)
        rows.setdefault("base", []).append((0.0, fleet.losses(None)[1]))
        for name, arm in arms(fleet).items():
            rows.setdefault(name, []).append(best(arm, rates))
            print(f"seed {seed}, {name}: {rows[name][-1][1]:.3f}", flush=True)
    means = {name: fmean(loss for _, loss in found) for name, found in rows.items()}
    table = Table(title="Held-out loss, nats a token", title_justify="left")
    for heading in ("arm", "mean", "seeds", "learning rates"):
        table.add_column(heading)
    for name, found in rows.items():
        losses = " ".join(f"{loss:.3f}" for _, loss in found)
        table.add_row(
            name, f"{means[name]:.3f}", losses, " ".join(f"{rate:g}" for rate, _ in found)
        )
    Console().print(table)
    merged = means["anchored"]
    write_claims(
        "quality",
        [
            _below("anchored against the base", merged, means["base"]),
            _below("anchored against local only", merged, means["local only"]),
            _below("anchored against hetlora", merged, means["hetlora"]),
            _below("anchored against flexlora", merged, means["flexlora"]),
        ],
        losses={name: [loss for _, loss in found] for name, found in rows.items()},
        rates={name: [rate for rate, _ in found] for name, found in rows.items()},
    )


def _below(claim: str, loss: float, than: float) -> Claim:
    return Claim(claim, loss / than, "< 1", loss < than)
