"""How a fleet of thousands fits one small computer: real broker, real aggregator, the agent's code.

    python -m benchmarks.fleet [--quick] [--sizes N …]

Virtual devices (docs/replay.md) on Mosquitto: each connects, hears the job, downloads the version
and, if it is drawn, sends an update with the bytes of a real training. Two rounds; the second is
measured: all devices download a version that is new, and some 550 upload. Then 1,000 devices of
which 20 really train. Writes runs/bench/fleet.json and fleet.png.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import base_tiny
from aggregator.config import build_job
from aggregator.rounds import Policy
from benchmarks.claims import FOLDER, Claim, write_claims
from device_profiles.demo_text import write_demo_text
from device_profiles.replay import DEMO_TRAINING, REFERENCE_PARAMETERS
from device_profiles.traces.format import Trace
from device_profiles.traces.sample import Sample
from device_profiles.virtual.broker import find_mosquitto
from device_profiles.virtual.device import Fidelity
from device_profiles.virtual.fleet import cast
from device_profiles.virtual.pool import Pool, find_pool
from device_profiles.virtual.run import Staging, Watched, replay_traces
from edge_client.calibrate import cache_folder
from protocol.messages import Job

LADDER = [2, 4]
UPLOADS = 550
"""Expected; who is asked is drawn."""
GROWTH = 1.2
MEASURED_ROUND = 2
LOOK_EVERY = 200
"""Events between two looks at what processes take."""


@dataclass(frozen=True, slots=True)
class Case:
    """A fleet: how many devices of each fidelity, and the share of those that are asked."""

    name: str
    fidelities: Mapping[Fidelity, int]
    uploads: int

    @property
    def devices(self) -> int:
        return sum(self.fidelities.values())

    @property
    def taking_part(self) -> int:
        return self.devices - self.fidelities.get("headless", 0)


@dataclass(slots=True)
class Found:
    """What one run showed."""

    result: dict[str, Any] = field(default_factory=dict)
    made: int = 0
    """Updates that devices have put into their outboxes."""
    counted: list[tuple[str, int]] = field(default_factory=list)
    joined_s: float = 0.0
    """Until the first round was opened."""
    round_s: float = 0.0
    round_bytes: int = 0
    aggregator_mib: float = 0.0
    broker_mib: float = 0.0
    replay_mib: float = 0.0
    unfit: int = 0

    @property
    def in_round(self) -> int:
        """Updates that counted in the measured round."""
        return sum(1 for _, number in self.counted if number == MEASURED_ROUND)

    @property
    def twice(self) -> int:
        return len(self.counted) - len(set(self.counted))

    @property
    def lost(self) -> int:
        return self.made - len(self.counted)


class Watch:
    """Watch one run: times, bytes, memory."""

    def __init__(self) -> None:
        self.watched, self.found = Watched(), Found()
        self._began = time.monotonic()
        self._opened: tuple[float, int] = (0.0, 0)
        self._events = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event of the replay."""
        kind, found = event["event"], self.found
        now = time.monotonic() - self._began
        if kind == "aggregator.counted":
            found.counted.append((event["device"], event["round"]))
        elif kind == "state" and event["state"] == "uploading":
            found.made += 1
        elif kind == "ended":
            found.unfit += 1
        elif kind == "aggregator.round" and event["state"] == "open":
            found.joined_s = found.joined_s or now
            self._opened = now, self.watched.bytes
        elif kind == "aggregator.merged" and event["round"] == MEASURED_ROUND:
            found.round_s = now - self._opened[0]
            found.round_bytes = self.watched.bytes - self._opened[1]
        self._events += 1
        if self._events % LOOK_EVERY == 0 or kind == "aggregator.merged":
            self._look()

    def _look(self) -> None:
        watched, found = self.watched, self.found
        assert watched.broker is not None and watched.broker.pid and watched.aggregator_pid
        found.aggregator_mib = max(found.aggregator_mib, mib(watched.aggregator_pid))
        found.broker_mib = max(found.broker_mib, mib(watched.broker.pid))
        found.replay_mib = max(found.replay_mib, mib(None))


def mib(pid: int | None) -> float:
    """Return what a process has in memory; None: this one."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def some_traces(seed: int) -> list[Trace]:
    """Return traces of devices on mains and on links from 5 to 50 Mbit/s."""
    draw = random.Random(seed)
    traces = []
    for number in range(64):
        down = draw.choice((5.0, 10.0, 20.0, 50.0))
        sample = Sample(power="mains", down_mbit=down, up_mbit=down / draw.choice((2, 5, 10)))
        traces.append(Trace(f"home-{number}", None, None, None, [sample]))
    return traces


def make_job(case: Case) -> tuple[Job, Policy]:
    """Return the job of a case, of base-tiny."""
    taking_part = case.taking_part
    return build_job(
        {
            "job": "fleet",
            "model": "base-tiny",
            "rounds": MEASURED_ROUND,
            "ladder": LADDER,
            "training": DEMO_TRAINING,
            "policy": {
                # Those whose memory is too small end, and are not waited for.
                "min_devices": int(0.8 * taking_part),
                "quorum": 1,
                "fraction": min(1.0, case.uploads / taking_part),
                "deadline_s": 24 * 3600.0,
            },
        },
        "the benchmark",
    )


def run_case(case: Case, folder: Path, text: Sequence[Path]) -> Found:
    """Run one case in a folder of its own."""
    folder.mkdir()
    job, policy = make_job(case)
    model = base_tiny.PATH
    pool: Pool = find_pool(job, model, text, cache_folder(), print)
    staging = Staging(
        job=job,
        policy=policy,
        parts=cast(some_traces(0), case.devices, 0, case.fidelities, spread=True),
        seed=0,
        model="base-tiny",
        text=text,
        memory_scale=max(1.0, REFERENCE_PARAMETERS / job.base.parameters),
    )
    watch = Watch()
    watch.found.result = replay_traces(staging, folder, pool, watch.take, watch.watched)
    return watch.found


def growing(sizes: Sequence[int], quick: bool) -> list[Case]:
    """Return fleets of growing size that all have as many uploads."""
    uploads = 60 if quick else UPLOADS
    cases = []
    for size in sizes:
        recorded = min(size, max(sizes[0], size // 2))
        parts: dict[Fidelity, int] = {"recorded": recorded, "headless": size - recorded}
        cases.append(Case(f"{size:,}", {k: n for k, n in parts.items() if n}, uploads))
    return cases


def training(quick: bool) -> Case:
    """Return the fleet of which some really train."""
    train, size = (2, 50) if quick else (20, 1_000)
    return Case(f"{size:,}, {train} training", {"train": train, "recorded": size - train}, size)


def main() -> None:
    """Run the fleets, print a table, draw it, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="hundreds of devices")
    parser.add_argument("--sizes", type=int, nargs="+", help="fleets, ascending")
    given = parser.parse_args()
    quick = given.quick
    sizes = given.sizes or ((100, 400) if quick else (1_000, 3_000, 10_000))
    if find_mosquitto() is None:
        sys.exit("this needs Mosquitto: apt install mosquitto")
    runs: list[tuple[Case, Found]] = []
    with tempfile.TemporaryDirectory(prefix="tunefleet-fleet-") as temporary:
        root = Path(temporary)
        text = [root / "text" / part.name for part in write_demo_text(root / "text", seed=0)]
        for number, case in enumerate([*growing(sizes, quick), training(quick)]):
            runs.append((case, run_case(case, root / f"run-{number}", text)))
            print_row(*runs[-1], first=number == 0)
    draw(runs[:-1], FOLDER / "fleet.png")
    write_claims("fleet", make_claims(runs), runs=[describe(*run) for run in runs])


def print_row(case: Case, found: Found, *, first: bool) -> None:
    """Print what a case came to."""
    if first:
        print(
            "devices             join s  round s  uploads      MB   MB/s  aggregator  broker  MiB"
        )
    print(
        f"{case.name:18} {found.joined_s:7.1f} {found.round_s:8.1f} {found.in_round:8} "
        f"{found.round_bytes / 1e6:7.0f} {found.round_bytes / 1e6 / found.round_s:6.1f} "
        f"{found.aggregator_mib:11.1f} {found.broker_mib:7.1f}  (replay {found.replay_mib:.0f})",
        flush=True,
    )


def describe(case: Case, found: Found) -> dict[str, object]:
    """Return a run's figures for the JSON file."""
    counts = Counter(number for _, number in found.counted)
    return {
        "case": case.name,
        "fidelities": dict(case.fidelities),
        "joined_s": found.joined_s,
        "round_s": found.round_s,
        "round_bytes": found.round_bytes,
        "uploads": dict(counts),
        "lost": found.lost,
        "twice": found.twice,
        "unfit": found.unfit,
        "aggregator_mib": found.aggregator_mib,
        "broker_mib": found.broker_mib,
        "replay_mib": found.replay_mib,
        "wall_s": found.result["wall_s"],
        "ended": found.result["ended"],
    }


def draw(runs: Sequence[tuple[Case, Found]], path: Path) -> None:
    """Draw how a round's time and both memories grow with the fleet."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [case.devices for case, _ in runs]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    times.plot(sizes, [found.round_s for _, found in runs], "o-", label="a round, s")
    times.plot(
        sizes, [found.round_bytes / 1e7 for _, found in runs], "s--", label="its bytes, 10 MB"
    )
    memory.plot(sizes, [found.aggregator_mib for _, found in runs], "o-", label="aggregator, MiB")
    memory.plot(sizes, [found.broker_mib for _, found in runs], "s-", label="Mosquitto, MiB")
    for axes in (times, memory):
        axes.set_xlabel("devices")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def make_claims(runs: Sequence[tuple[Case, Found]]) -> list[Claim]:
    """Return what was asked of the runs, and what came out."""
    *grown, (train_case, trained) = runs
    (small_case, small), (large_case, large) = grown[0], grown[-1]
    memory = large.aggregator_mib / small.aggregator_mib
    per_byte = (large.round_s / large.round_bytes) / (small.round_s / small.round_bytes)
    wanted = 500 if large_case.devices >= 10_000 else 0.8 * large_case.uploads
    ended = all(found.result["ended"] == "finished" for _, found in runs)
    lost = sum(found.lost for _, found in runs)
    twice = sum(found.twice for _, found in runs)
    devices = f"{small_case.name} → {large_case.name} devices"
    return [
        Claim("every round ends", "yes" if ended else "no", "yes", ended),
        Claim(f"uploads in a round of {large_case.name} devices", float(large.in_round),
              f"≥ {wanted:.0f}", large.in_round >= wanted),
        Claim("updates lost", float(lost), "0", lost == 0),
        Claim("updates counted twice", float(twice), "0", twice == 0),
        Claim(f"aggregator's memory, {devices}", memory, f"≤ {GROWTH}", memory <= GROWTH),
        Claim(f"time a round per byte, {devices}", per_byte, "≤ 1", per_byte <= 1),
        Claim(f"updates in round 2 of {train_case.name}", float(trained.in_round), "> 0",
              trained.in_round > 0),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
