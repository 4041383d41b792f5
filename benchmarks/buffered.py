"""Synchronous rounds against buffered ones: virtual seconds to a target loss, on unequal devices.

    python -m benchmarks.buffered [--quick] [--rounds 12]

The demo's six texts, at ranks of 4 and 16, train in one process, each device in virtual time: as
long as its cores would take for a base of 135 M parameters (`FLOPS_A_CYCLE` each), and its link for
the bytes, both from its profile. When a round is merged, and which updates still count, is decided
by the aggregator's own functions. The target is the loss that synchronous rounds have come to at
last. Losses are of the held-out split, in nats a token, means over devices. Writes
runs/bench/buffered.json.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import fmean

from rich.console import Console
from rich.table import Table

from aggregator.merge import RoundView, Update, merge
from aggregator.merge.round_view import completed, rebased
from aggregator.rounds import Answers, Policy, RoundState, next_action, wanted_no_more
from benchmarks.claims import Claim, write_claims
from benchmarks.quality.demo import demo_simulation
from benchmarks.simulation import SimulatedDevice, Simulation, rounded
from device_profiles.fleet import DEMO_DEVICES
from device_profiles.replay import DEMO_TRAINING
from device_profiles.schema import load_profile
from protocol.adapter import Adapter, initial_adapter, parameter_count
from protocol.messages import Job, UploadManifest, describe_file, upload_id

PARAMETERS = 135e6
FLOPS_A_CYCLE = 2.0
"""Of a core, in training: some of what its vector unit could do."""
LADDER = [4, 8, 16]
"""Below the demo's, so that most of the time goes into training."""
ROWS = 8
"""Of each device's held-out text, on which a loss is measured after each merge."""
PROFILES = {name: profile for name, profile, _ in DEMO_DEVICES}
PutOnto = Callable[[Update, Adapter, Adapter], Update]


@dataclass(frozen=True, slots=True)
class Arm:
    """How rounds are run: the policy, and how what is behind gets onto the newest version."""

    name: str
    policy: Policy
    put: PutOnto


def as_value(update: Update, started: Adapter, newest: Adapter) -> Update:
    """Put what a device trained over the version it started from, as synchronous rounds do."""
    return completed(update, started)


def arms(devices: int) -> list[Arm]:
    """Return the arms; the first is what the others are compared with."""
    found = [Arm("synchronous", Policy(quorum=devices), as_value)]
    for size in (2, 3):
        policy = Policy(buffer=size, max_staleness=20, keep_versions=0)
        found.append(Arm(f"buffered, {size}", policy, rebased))
    return [*found, replace(found[-1], name=f"{found[-1].name}, as values", put=as_value)]


def seconds(job: Job, device: SimulatedDevice) -> float:
    """Return how long a device takes to download, train and upload, in virtual seconds."""
    profile = load_profile(PROFILES[device.name])
    cycles = sum(cores.count * (cores.max_mhz or 0) * 1e6 for cores in profile.cores)
    tokens = job.training.steps * job.training.tokens_per_step
    train_s = 6 * PARAMETERS * tokens / (cycles * FLOPS_A_CYCLE)
    bits = 16 * parameter_count(job.base.modules, device.rank)
    link = profile.link
    assert link is not None and link.up_mbit and link.down_mbit, "the demo's profiles have it"
    return train_s + bits / (1e6 * link.up_mbit) + bits / (1e6 * link.down_mbit)


@dataclass(slots=True)
class Course:
    """Hold what an arm came to: a loss after each version, and how far behind updates were."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    """Virtual seconds, and nats a token."""
    behind: list[int] = field(default_factory=list)

    def reached(self, target: float) -> float | None:
        """Return when the loss was at the target for the first time."""
        return next((at for at, loss in self.losses if loss <= target), None)


class Fleet:
    """Run one arm in virtual time until `until_s`, or for so many rounds."""

    def __init__(self, simulation: Simulation, job: Job, arm: Arm) -> None:
        self._simulation, self._job, self._arm = simulation, job, arm
        self._ranks = {d.name: d.rank for d in simulation.devices}
        self._streams = {d.name: simulation.stream(d) for d in simulation.devices}
        self._trained = dict.fromkeys(self._ranks, 0)
        self._versions = {1: initial_adapter(job.base.modules, job.rank, job.scale, job.seed)}
        self._now = RoundState(1, "open", 1, None)
        self._buffer: dict[str, tuple[UploadManifest, Update]] = {}
        self._busy: list[tuple[float, int, SimulatedDevice, RoundState]] = []
        self._order = count()
        self.course = Course()

    def run(self, *, rounds: int, until_s: float = float("inf")) -> Course:
        """Return how the loss went."""
        at = 0.0
        self._send_out(at)
        while self._now.number <= rounds:
            at, _, device, began = heapq.heappop(self._busy)
            if at > until_s:
                break
            self._deliver(device, began)
            if self._is_due(at):
                self._merge(at)
            self._send_out(at)
        return self.course

    def _send_out(self, at: float) -> None:
        """Have every device that is free train from the newest version, if it has not."""
        busy = {device.name for _, _, device, _ in self._busy}
        for device in self._simulation.devices:
            if device.name not in busy and self._trained[device.name] < self._now.number:
                self._trained[device.name] = self._now.number
                done = at + seconds(self._job, device)
                heapq.heappush(self._busy, (done, next(self._order), device, self._now))

    def _deliver(self, device: SimulatedDevice, began: RoundState) -> None:
        name, version = device.name, self._versions[began.version]
        update, self._ranks[name] = self._simulation.round(
            self._job, device, self._ranks[name], version, began.number, self._streams[name]
        )
        manifest = UploadManifest(
            job=self._job.job,
            device=name,
            upload=upload_id(name, self._job.job, began.number),
            round=began.number,
            version=began.version,
            rank=self._ranks[name],
            rank_trained=device.rank,
            held=device.held,
            encoding=self._job.encoding_up,
            file=describe_file(b"-"),
            examples=update.examples,
        )
        refused = wanted_no_more(
            manifest,
            self._now,
            self._arm.policy,
            another_counts=lambda: name in self._buffer,
            was_left=lambda: False,
            is_kept=lambda number: number in self._versions,
        )
        if not refused:
            self._buffer[f"{name} {began.number}"] = manifest, update
            self.course.behind.append(self._now.number - began.number)

    def _is_due(self, at: float) -> bool:
        answers = Answers(self._now.number)
        for manifest, _ in self._buffer.values():
            answers.add(manifest)
        action = next_action(
            self._now,
            self._arm.policy,
            job=self._job.job,
            rounds=1 << 30,
            time_s=at,
            online={device.name for device in self._simulation.devices},
            delivered=answers.delivered(self._arm.policy),
            buffered=len(answers.updates),
        )
        return action == "merge"

    def _merge(self, at: float) -> None:
        job, newest, number = self._job, self._versions[self._now.version], self._now.number
        updates = []
        for manifest, update in self._buffer.values():
            if behind := number - manifest.round:
                put = self._arm.put(update, self._versions[manifest.version], newest)
                update = replace(put, staleness=behind)
            updates.append(update)
        view = RoundView(newest, updates, job.base.modules, job.rank, job.seed + number)
        merged = merge(job.rule, view, settings={"staleness": True, **job.rule_settings})
        self._versions[number + 1] = shared = rounded(merged.adapter, job)
        self._now, self._buffer = RoundState(number + 1, "open", number + 1, None), {}
        losses = self._simulation.evaluate(shared)
        self.course.losses.append((at, fmean(losses.values())))


def show(courses: dict[str, Course], target: float) -> None:
    """Print a table of all arms."""
    table = Table(title=f"Until the loss is {target:.4f}", title_justify="left")
    for heading in ("rounds", "virtual s", "merges", "updates", "mean behind", "loss in the end"):
        table.add_column(heading)
    for name, course in courses.items():
        reached = course.reached(target)
        behind = sum(course.behind) / max(len(course.behind), 1)
        table.add_row(
            name,
            "-" if reached is None else f"{reached:.0f}",
            str(len(course.losses)),
            str(len(course.behind)),
            f"{behind:.2f}",
            f"{course.losses[-1][1]:.4f}",
        )
    Console().print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="synchronous rounds")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    given = parser.parse_args()
    rounds = 3 if given.quick else given.rounds
    simulation = demo_simulation(0)
    simulation.setting = replace(simulation.setting, most_rows={"held_out": ROWS})
    simulation.devices = [
        replace(device, rank=min(device.rank, LADDER[-1]), held=LADDER[-1])
        for device in simulation.devices
    ]
    job = simulation.job(ladder=LADDER, training={**DEMO_TRAINING, "learning_rate": given.rate})
    courses: dict[str, Course] = {}
    for arm in arms(len(simulation.devices)):
        fleet = Fleet(simulation, job, arm)
        if not courses:
            courses[arm.name] = fleet.run(rounds=rounds)
            end, target = courses[arm.name].losses[-1]
        else:
            courses[arm.name] = fleet.run(rounds=1 << 30, until_s=end)
        print(f"{arm.name}: {courses[arm.name].losses[-1][1]:.4f}", flush=True)
    show(courses, target)
    best = min(
        (reached, name)
        for name, course in courses.items()
        if (reached := course.reached(target)) is not None
    )
    write_claims(
        "buffered",
        [
            Claim(
                "buffered against synchronous, time to its loss",
                best[0] / end,
                "< 1",
                best[0] < end,
            )
        ],
        target=target,
        losses={name: course.losses for name, course in courses.items()},
        behind={name: course.behind for name, course in courses.items()},
    )


if __name__ == "__main__":
    main()
