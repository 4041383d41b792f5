"""Synchronous rounds against buffered ones on the same traces: virtual time to the same loss.

    python -m benchmarks.buffered [--quick] [--cases CASE …] [--seeds 0 1 2] [--buffers 3]

Six virtual devices (docs/replay.md) with the demo's six texts really train, against Mosquitto and
the real aggregator: first with the policy that a replay has by itself, whose rounds wait for all
who are at work, then with a buffer of three updates until the virtual time at which those rounds
were over. The target is the loss that they came to: of a version, on held-out text of all six
devices, in nats a token.

Runs are kept in runs/bench/buffered, to look at with `fleet-replay compare`; one that is there is
not done again. Writes runs/bench/buffered.json and buffered.png.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.claims import FOLDER, Claim, write_claims
from device_profiles.traces.format import SUFFIX, Trace, write_trace
from device_profiles.traces.sample import Sample
from device_profiles.virtual.broker import find_mosquitto
from device_profiles.virtual.compare import Run
from device_profiles.virtual.options import Options, prepare
from device_profiles.virtual.run import LONGEST_S, RESULT, replay_traces
from edge_client.calibrate import cache_folder

RUNS = FOLDER / "buffered"
UNEQUAL = "unequal"
PROFILES = (
    "jetson-nano-4gb",
    "laptop-16gb",
    "macbook-pro-m1-pro-16gb",
    "orange-pi-5-8gb",
    "raspberry-pi-4b-2gb",
    "raspberry-pi-5-8gb",
)
"""Of the devices of this case. A round's training takes them from 10 to 109 s."""
DEVICES = len(PROFILES)
CASES = (UNEQUAL, "thermal-throttle", "device-churn")
"""The first is `unequal_traces`, the others are scenarios."""
ROUNDS = 6
"""Synchronous ones, as in the demo."""
MOST_MERGES = 10_000
MAX_STALENESS = 20
SYNCHRONOUS = "synchronous"
Arm = tuple[str, Mapping[str, Any]]
"""Its name, and settings of the policy beside the usual ones."""


def make_arms(buffers: Sequence[int]) -> list[Arm]:
    """Return the policies that are compared; the first is synchronous."""
    settings = {"mode": "buffered", "max_staleness": MAX_STALENESS}
    buffered: list[Arm] = [(f"buffer {size}", {**settings, "buffer": size}) for size in buffers]
    return [(SYNCHRONOUS, {}), *buffered]


@dataclass(frozen=True, slots=True)
class Found:
    """What one run came to."""

    case: str
    seed: int
    arm: str
    course: list[tuple[float, float]]
    """Virtual seconds at which each version was there, and its loss; the first is the base."""
    reached_s: float | None
    """When the loss was down to that of synchronous rounds; None: it was not in their time."""
    updates: int
    older: int
    """Of these, how many were trained from an older version than the newest."""
    devices: Mapping[str, float]
    """Each device's loss with the last version."""

    @property
    def end_s(self) -> float:
        return self.course[-1][0]

    @property
    def loss(self) -> float:
        """The last version's."""
        return self.course[-1][1]


def unequal_traces(folder: Path) -> Path:
    """Write traces of devices that are always there, on mains, and only unequally fast."""
    for profile in PROFILES:
        source = "made by benchmarks/buffered.py"
        trace = Trace(profile, profile, source, "Apache-2.0", [Sample(power="mains")])
        write_trace(folder / f"{profile}{SUFFIX}", trace)
    return folder


def replay(case: str, seed: int, arm: Arm, rounds: int, until_s: float = LONGEST_S) -> Run:
    """Replay a case, or read what it came to before."""
    name, policy = arm
    folder = RUNS / f"{case}-{seed}-{name.replace(' ', '-')}-{rounds}"
    if not (folder / RESULT).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        traces = unequal_traces(RUNS / UNEQUAL) if case == UNEQUAL else ""
        options = Options(
            traces=str(traces),
            scenario="" if traces else case,
            devices=DEVICES,
            fidelity=f"train={DEVICES}",
            seed=seed,
            until_s=until_s,
            processes=DEVICES,
            job={"rounds": MOST_MERGES if policy else rounds, "policy": policy},
        )
        staging, pool, _ = prepare(options, folder, cache_folder(), print)
        replay_traces(staging, folder, pool, lambda event: None)
    return Run(folder)


def compared(case: str, seed: int, rounds: int, arms: Sequence[Arm]) -> list[Found]:
    """Replay a case with each policy; the first is synchronous, and sets time and target."""
    plain = replay(case, seed, arms[0], rounds)
    end_s = max(each["merged_s"] for each in plain.rounds if each["version"])
    found = [describe(case, seed, SYNCHRONOUS, plain, end_s, None)]
    for arm in arms[1:]:
        run = replay(case, seed, arm, rounds, end_s)
        found.append(describe(case, seed, arm[0], run, end_s, found[0].loss))
    for one in found:
        print(f"{case}, seed {seed}, {one.arm}: {one.loss:.4f} at {end_s:.0f} s", flush=True)
    return found


def describe(case: str, seed: int, arm: str, run: Run, end_s: float, target: float | None) -> Found:
    """Return what a run came to by a time; without a target it is its own."""
    merged = [r for r in run.rounds if r["version"] and r["merged_s"] <= end_s]
    course = [(r["merged_s"], r["version_loss"]) for r in merged]
    reached = run.reached_s(course[-1][1] if target is None else target)
    return Found(
        case=case,
        seed=seed,
        arm=arm,
        course=[(0.0, run.result["base_loss"]), *course],
        reached_s=reached if reached is not None and reached <= end_s else None,
        updates=sum(r["counted"] for r in merged),
        older=sum(r["late"] for r in merged),
        devices=merged[-1]["version_losses"],
    )


def shares(found: Sequence[Found], case: str, arm: str) -> list[float | None]:
    """Return, by seed, the time to the target as a share of that with synchronous rounds."""
    theirs = {f.seed: f.reached_s for f in found if f.case == case and f.arm == SYNCHRONOUS}
    mine = [f for f in found if f.case == case and f.arm == arm]
    return [None if f.reached_s is None else f.reached_s / (theirs[f.seed] or 1) for f in mine]


def better(found: Sequence[Found], one: Found) -> str:
    """Return for how many devices' texts the last version is better than synchronous rounds'."""
    (theirs,) = (f for f in found if (f.case, f.seed, f.arm) == (one.case, one.seed, SYNCHRONOUS))
    return str(sum(loss < theirs.devices[name] for name, loss in one.devices.items()))


def show(found: Sequence[Found]) -> None:
    """Print a table: a row for each case and policy, over seeds."""
    table = Table(title="Until synchronous rounds were over", title_justify="left")
    headings = ("case", "rounds", "of the time", "loss", "better", "merges", "updates", "older")
    for heading in headings:
        table.add_column(heading)
    for case, arm in dict.fromkeys((f.case, f.arm) for f in found):
        runs = [f for f in found if (f.case, f.arm) == (case, arm)]
        table.add_row(
            case,
            arm,
            ", ".join("–" if s is None else f"{s:.2f}" for s in shares(found, case, arm)),
            ", ".join(f"{f.loss:.4f}" for f in runs),
            ", ".join(better(found, f) for f in runs),
            ", ".join(str(len(f.course) - 1) for f in runs),
            ", ".join(str(f.updates) for f in runs),
            ", ".join(f"{f.older / f.updates:.0%}" for f in runs),
        )
    Console().print(table)


def draw(found: Sequence[Found], path: Path) -> None:
    """Draw the loss over virtual time, a panel for each case, of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(f.case for f in found))
    figure, panels = pyplot.subplots(1, len(cases), figsize=(4 * len(cases), 3.5), squeeze=False)
    for case, axes in zip(cases, panels[0], strict=True):
        for one in found:
            if one.case == case and one.seed == found[0].seed:
                minutes = [at / 60 for at, _ in one.course]
                axes.step(minutes, [loss for _, loss in one.course], where="post", label=one.arm)
        axes.set_title(case)
        axes.set_xlabel("virtual minutes")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out loss, nats a token")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def make_claims(found: Sequence[Found]) -> list[Claim]:
    """Return, for each case and buffer, the time to the target by that of synchronous rounds."""
    claims = []
    for case, arm in dict.fromkeys((f.case, f.arm) for f in found if f.arm != SYNCHRONOUS):
        reached = shares(found, case, arm)
        known = [share for share in reached if share is not None]
        missed = f"not reached with {len(reached) - len(known)} of {len(reached)} seeds"
        mean = fmean(known) if len(known) == len(reached) else None
        claims.append(
            Claim(
                f"{case}, {arm}: time to the loss of synchronous rounds, by theirs",
                missed if mean is None else mean,
                "< 1",
                mean is not None and mean < 1,
            )
        )
    return claims


def main() -> None:
    """Replay all cases, print a table, draw it, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case, seed and buffer; 2 rounds")
    parser.add_argument("--buffers", type=int, nargs="+", default=[3])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    cases, seeds, rounds, arms = given.cases, given.seeds, ROUNDS, make_arms(given.buffers)
    if given.quick:
        cases, seeds, rounds, arms = CASES[:1], [0], 2, arms[:2]
    if find_mosquitto() is None:
        sys.exit("this needs Mosquitto: apt install mosquitto")
    found: list[Found] = []
    for case in cases:
        for seed in seeds:
            found += compared(case, seed, rounds, arms)
    show(found)
    draw(found, FOLDER / "buffered.png")
    write_claims("buffered", make_claims(found), runs=[asdict(one) for one in found])


if __name__ == "__main__":
    main()
