"""What one device that sends what it should not does to the loss: `python -m benchmarks.attacks`.

    python -m benchmarks.attacks [--quick] [--data DIR] [--datasets NAME ...] [--seeds N ...]

Nine honest devices and one more, which sends in every round, with the directions of one of them:

    flipped    its change of both factors, the other way
    scaled     a hundred times its change
    random     numbers at random, as large as its factors
    stale      what stood in those directions when the job began

A rule's loss is the mean over the honest devices' held-out text, by that of the same rule and
settings with the honest devices alone. `--data` is the folder of `benchmarks.quality`, of which
nine roles are taken, or three devices of each of three domains; without it the demo's six devices
and base-tiny. Writes runs/bench/attacks.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from aggregator.errors import MergeError
from aggregator.merge import RoundView, Update
from benchmarks.claims import Claim, write_claims
from benchmarks.quality.arms import BALANCED, BY_RANK, ROTATING, Arm, Schedule
from benchmarks.quality.demo import demo_simulation
from benchmarks.quality.fleets import DATASETS, open_fleet
from benchmarks.simulation import Simulation
from edge_client.errors import TrainingDiverged
from protocol.adapter import Adapter, Factors, select
from protocol.cli import run_command

AT_MOST = 1.02
"""What a rule that withstands an attack comes to, by its loss among the honest alone."""
ATTACKER = "attacker"
RANKS = (2, 16, 4, 8, 8, 4, 16, 2, 8)
PER_DOMAIN = 3
SOURCE = 1
"""The honest device whose update the attacker spoils: of the largest rank, so the worst."""

Attack = Callable[[Update, RoundView, Adapter, np.random.Generator], Adapter]
"""An honest update, its round, the job's first adapter, and chance → what is sent."""


def _along(part: float) -> Attack:
    """Return an attack that goes `part` of the way that an honest device went."""

    def attack(honest: Update, view: RoundView, *_: object) -> Adapter:
        before, after = select(view.previous, honest.directions), honest.adapter
        layers = {}
        for name, f in before.layers.items():
            g = after.layers[name]
            layers[name] = Factors(f.a + part * (g.a - f.a), f.b + part * (g.b - f.b))
        return Adapter(layers, before.scale)

    return attack


def _at_random(
    honest: Update, view: RoundView, first: Adapter, rng: np.random.Generator
) -> Adapter:
    def like(values: np.ndarray) -> np.ndarray:
        return np.asarray(rng.standard_normal(values.shape) * values.std(), np.float32)

    layers = {n: Factors(like(f.a), like(f.b)) for n, f in honest.adapter.layers.items()}
    return Adapter(layers, honest.adapter.scale)


def _stale(honest: Update, view: RoundView, first: Adapter, rng: np.random.Generator) -> Adapter:
    return select(first, honest.directions)


ATTACKS: Mapping[str, Attack] = {
    "flipped": _along(-1.0),
    "scaled": _along(100.0),
    "random": _at_random,
    "stale": _stale,
}
CLIPPED = {**ROTATING, "rule_settings": {**BALANCED, "clip": "median"}}
OPPOSED = {**ROTATING, "rule_settings": {**CLIPPED["rule_settings"], "opposed": 0.2}}
KRUM_OPPOSED = {**ROTATING, "rule_settings": {**BALANCED, "opposed": 0.2}}
ARMS: Mapping[str, Arm] = {
    "fedavg": Arm("common", {"rule": "fedavg"}, start=1.6e-2),
    "anchored": Arm("common", {"rule": "anchored", **ROTATING}, BY_RANK),
    "anchored, clipped": Arm("common", {"rule": "anchored", **CLIPPED}, BY_RANK),
    "geomed": Arm("common", {"rule": "geomed", **ROTATING}, BY_RANK),
    "geomed, clipped": Arm("common", {"rule": "geomed", **CLIPPED}, BY_RANK),
    "krum": Arm("common", {"rule": "krum", **ROTATING}, BY_RANK),
    "krum, clipped": Arm("common", {"rule": "krum", **CLIPPED}, BY_RANK),
    "anchored, clipped, opposed": Arm("common", {"rule": "anchored", **OPPOSED}, BY_RANK),
    "geomed, clipped, opposed": Arm("common", {"rule": "geomed", **OPPOSED}, BY_RANK),
    "krum, opposed": Arm("common", {"rule": "krum", **KRUM_OPPOSED}, BY_RANK),
    "krum, opposed, optimiser that fits": Arm(
        "common", {"rule": "krum", **KRUM_OPPOSED}, BY_RANK, fits=True
    ),
}
ROBUST = tuple(name for name in ARMS if name not in ("fedavg", "anchored"))


def main() -> None:
    """Run the benchmark; what went wrong ends in one line."""
    run_command(run)


def run() -> None:
    """Run every arm under every attack, print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of text and models, see quality/")
    parser.add_argument("--datasets", nargs="+", default=DATASETS, metavar="NAME")
    parser.add_argument("--model", default="stories260K", metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--rules", nargs="+", default=tuple(ARMS), choices=ARMS, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="two rounds: shows that it runs")
    options = parser.parse_args()
    schedule = Schedule(rounds=2) if options.quick else Schedule()
    places = options.datasets if options.data else ["demo"]
    ratios: dict[str, dict[str, float]] = {}
    for place in places:
        for seed in options.seeds:
            fleet = (
                open_fleet(
                    options.data,
                    place,
                    options.model,
                    schedule,
                    seed=seed,
                    ranks=RANKS,
                    per_domain=PER_DOMAIN,
                )
                if options.data
                else demo_simulation(seed)
            )
            for arm in options.rules:
                row = ratios.setdefault(f"{place}, seed {seed}, {arm}", {})
                alone = loss(fleet, schedule, arm, None)
                row["honest alone"] = alone
                for attack in ATTACKS:
                    row[attack] = loss(fleet, schedule, arm, attack) / alone
                    print(f"{place}, seed {seed}, {arm}, {attack}: {row[attack]:.4f}", flush=True)
    found = claims(ratios, places, options.seeds, options.rules)
    write_claims("attacks", found, losses=ratios)


def loss(fleet: Simulation, schedule: Schedule, arm: str, attack: str | None) -> float:
    """Return the mean held-out loss of the honest devices; infinite where training broke down."""
    chosen = ARMS[arm]
    job = chosen.whole_job(fleet, schedule, chosen.start)
    fleet = chosen.of_fleet(fleet, job)
    rng, begun = np.random.default_rng(fleet.seed), list[Adapter]()

    def spoiled(view: RoundView) -> RoundView:
        begun.append(view.previous)
        if attack is None:
            return view
        honest = view.updates[SOURCE]
        sent = ATTACKS[attack](honest, view, begun[0], rng)
        return replace(
            view, updates=[*view.updates, replace(honest, device=ATTACKER, adapter=sent)]
        )

    try:
        shared = fleet.federated(job, on_view=spoiled)
    except (TrainingDiverged, MergeError):  # numbers that float32 can't hold
        return math.inf
    found = fmean(fleet.evaluate(shared).values())
    return found if math.isfinite(found) else math.inf


def claims(
    ratios: Mapping[str, Mapping[str, float]],
    places: Sequence[str],
    seeds: Sequence[int],
    rules: Sequence[str] = tuple(ARMS),
) -> list[Claim]:
    """Return a claim for each rule that is to withstand, and what the mean of factors comes to."""
    made = []
    for place in places:
        for arm in rules:
            worst = max(
                ratios[f"{place}, seed {seed}, {arm}"][attack]
                for seed in seeds
                for attack in ATTACKS
            )
            said = f"loss under the worst attack by that of the honest alone, {place}, {arm}"
            if arm in ROBUST:
                made.append(Claim(said, worst, f"≤ {AT_MOST}", worst <= AT_MOST))
            elif arm == "fedavg":
                made.append(Claim(said, worst, f"> {AT_MOST}: it fails", worst > AT_MOST))
            else:
                made.append(Claim(said, worst, "reported", True))
    return made


if __name__ == "__main__":
    main()
