"""What the options of local training cost or gain.

    python -m benchmarks.options [--rates 2e-3 4e-3] [--quick]

The demo's six texts and ranks with the anchored rule, in one process, seed 0. Alternating factors
are shown after as many rounds, and after twice as many, which is as many bytes. Each has the
learning rate with which it does best on the trust split; losses are of the held-out split, in nats
a token, means over devices. Writes runs/bench/options.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.claims import Claim, write_claims
from benchmarks.quality.demo import best, demo_simulation
from benchmarks.simulation import Simulation
from device_profiles.replay import DEMO_TRAINING
from protocol.adapter import Adapter
from protocol.layers import block_count
from protocol.messages import Job

RATES = (2e-3, 4e-3, 8e-3)
ROUNDS, PRIVATE_RANK = 6, 8
PRIVATE = f"shared, and private of rank {PRIVATE_RANK}"
SHORT_OF_MEMORY = ("pi-3b-plus", "pi-4b-2gb")
"""Who trains half of the blocks."""


def job(fleet: Simulation, rate: float, rounds: int = ROUNDS, **training: Any) -> Job:
    """Return the demo's job with some settings."""
    return fleet.job(
        rounds=rounds, training={**DEMO_TRAINING, "learning_rate": rate, **training}, layers="fit"
    )


def in_part(fleet: Simulation) -> None:
    """Have the devices that are short of memory train the last half of the blocks."""
    half = block_count(job(fleet, RATES[0]).base.modules) // 2
    fleet.devices = [
        replace(device, blocks=half) if device.name in SHORT_OF_MEMORY else device
        for device in fleet.devices
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    parser.add_argument("--quick", action="store_true", help="one rate, and no more than the claim")
    options = parser.parse_args()
    rates = options.rates[:1] if options.quick else options.rates
    fleet = demo_simulation(0)
    found: dict[str, float] = {}

    def show(arm: str, loss: float, more: str = "") -> None:
        found[arm] = loss
        print(f"{arm:45} {loss:.3f} {more}", flush=True)

    def federated(rounds: int, factors: str) -> tuple[float, float]:
        return best(
            lambda rate: fleet.losses(fleet.federated(job(fleet, rate, rounds, factors=factors))),
            rates,
        )

    show("base", fleet.losses(None)[1])
    rate, loss = federated(ROUNDS, "both")
    show("shared", loss, f"at {rate:g}")
    chosen = job(fleet, rate)
    versions: list[Adapter] = []
    fleet.federated(chosen, on_round=lambda _, shared: versions.append(shared))
    each = chosen.training.steps
    last = versions[-1:]
    private = [
        (PRIVATE, last, each * ROUNDS),
        (f"{PRIVATE}, in {ROUNDS} parts", last * ROUNDS, each),
        (f"{PRIVATE}, beside each version", versions, each),
    ]
    for arm, beside, steps in private[:1] if options.quick else private:
        mixed = [fleet.mixed(chosen, d, PRIVATE_RANK, beside, steps) for d in fleet.devices]
        weights = ", ".join(f"{found.weight:g}" for found in mixed)
        show(arm, fmean(found.held_out for found in mixed), f"weights {weights}")
    for times, said in () if options.quick else ((1, "as many"), (2, "twice as many")):
        own = job(fleet, rate, times * ROUNDS)
        losses = [fleet.loss(fleet.alone(own, device), device) for device in fleet.devices]
        show(f"local only, {said} steps", fmean(losses))
    for rounds in () if options.quick else (ROUNDS, 2 * ROUNDS):
        rate, loss = federated(rounds, "alternating")
        show(f"alternating factors, {rounds} rounds", loss, f"at {rate:g}")
    if not options.quick:
        in_part(fleet)
        show("two devices train half of the blocks", fleet.losses(fleet.federated(chosen))[1])
    against = found[PRIVATE] / found["shared"]
    write_claims(
        "options",
        [Claim("shared and private against shared alone", against, "< 1", against < 1)],
        losses=found,
    )


if __name__ == "__main__":
    main()
