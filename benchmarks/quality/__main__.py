"""Held-out loss of merge rules, alone and together: `python -m benchmarks.quality`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.quality import demo
from benchmarks.quality.arms import ARMS, GRID, Result, Schedule, unknown_arm
from benchmarks.quality.fleets import DATASETS, open_fleet
from benchmarks.quality.report import Sheet, lost_rows, show, write
from benchmarks.quality.store import RUNS, Case, best_rate, read_published, write_published
from benchmarks.simulation import Simulation
from device_profiles.report_figure import some_of
from protocol.cli import run_command


def main() -> None:
    """Run the benchmark; what went wrong ends in one line."""
    run_command(run)


def run() -> None:
    """Run what the command line asks for, and show what came of it."""
    options = read_options()
    if options.data is None:
        demo.run(options.seeds or [0, 1, 2], quick=options.quick)
        return
    seeds = options.seeds or [0, 1, 2, 3, 4]
    benches = [
        Bench(options.data, dataset, model, Schedule(options.rounds), options.published)
        for model in options.models
        for dataset in options.datasets
    ]
    if not options.report:
        for seed in seeds[:1] if options.quick else seeds:
            for bench in benches:
                bench.run(options.arms, seed, search=not (options.no_search or options.quick))
    sheets = [bench.sheet(options.arms, seeds) for bench in benches]
    for sheet in sheets:
        if not sheet.found:
            print(_nothing_of(sheet, options, seeds), file=sys.stderr)
    sheets = [sheet for sheet in sheets if sheet.found]
    if not sheets:
        sys.exit("error: nothing to report; run it without --report, or name --published")
    show(sheets)
    if options.out:
        lost = lost_rows(sheets, options.out)
        if lost and not options.force:
            sys.exit(
                f"error: nothing was written to {options.out}: its tables have what these lack, "
                f"{some_of(lost, '; ')}; ask for that too, or write fewer rows with --force"
            )
        write(sheets, options.out)
        write_published(options.out, {k: v for b in benches for k, v in b.used.items()})


def _nothing_of(sheet: Sheet, options: argparse.Namespace, seeds: Sequence[int]) -> str:
    """Return what was looked for in vain, and where."""
    every = len(options.arms) == len(ARMS)
    arms = "any arm" if every else " or ".join(repr(arm) for arm in options.arms)
    numbers = ", ".join(map(str, seeds))
    where = f"{RUNS} and {options.published}" if options.published else RUNS
    return (
        f"{sheet.dataset}, {sheet.model}: no results of {arms} with {options.rounds} rounds and "
        f"seeds {numbers} in {where}"
    )


def read_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of text and models, see datasets.py")
    parser.add_argument("--datasets", nargs="+", default=DATASETS, metavar="NAME")
    parser.add_argument("--models", nargs="+", default=("stories260K",), metavar="NAME")
    parser.add_argument("--arms", nargs="+", default=tuple(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N")
    parser.add_argument("--rounds", type=int, default=Schedule().rounds, metavar="N")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate")
    parser.add_argument(
        "--no-search", action="store_true", help="give each arm the rate its search starts at"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, show what there is")
    parser.add_argument(
        "--out", type=Path, help="write tables, pictures and results to this folder too"
    )
    parser.add_argument("--force", action="store_true", help="write fewer rows than --out has")
    parser.add_argument(
        "--published", type=Path, metavar="FOLDER", help="take what was run from here too"
    )
    options = parser.parse_args()
    if strange := [name for name in options.arms if name not in ARMS]:
        parser.error(unknown_arm(strange[0]))
    return options


class Bench:
    """Run arms on one dataset and model, each at its best learning rate."""

    def __init__(
        self,
        data: Path,
        dataset: str,
        model: str,
        schedule: Schedule,
        published: Path | None = None,
    ) -> None:
        self._data, self._dataset, self._model = data, dataset, model
        self._schedule = schedule
        self._published = read_published(published) if published else {}
        self.used: dict[str, Result] = {}
        """Results that there are, by the names of their files."""
        self._fleets: dict[int, Simulation] = {}

    def run(self, arms: Sequence[str], seed: int, *, search: bool) -> None:
        """Run arms on one seed; the rate is the one that is best on the trust splits of seed 0."""
        for arm in arms:
            rate = ARMS[arm].start
            if search and ARMS[arm].searched and ARMS[arm].kind != "base":
                rate = best_rate(partial(self._trust, arm, 0), rate)
            self._trust(arm, seed, rate)

    def sheet(self, arms: Sequence[str], seeds: Sequence[int]) -> Sheet:
        """Return what there is of arms and seeds, each arm at its best rate of seed 0."""
        found: dict[str, dict[int, tuple[float, Result]]] = {}
        for arm in arms:
            cases = [self._case(arm, seeds[0], rate) for rate in GRID]
            done = {case.rate: result for case in cases if (result := self._read(case))}
            if not done:
                continue
            rate = min(done, key=lambda r, done=done: done[r].trust)  # type: ignore[misc]
            results = {seed: self._read(self._case(arm, seed, rate)) for seed in seeds}
            found[arm] = {s: (rate, result) for s, result in results.items() if result}
        return Sheet(self._dataset, self._model, found)

    def _case(self, arm: str, seed: int, rate: float) -> Case:
        return Case(self._dataset, self._model, arm, seed, rate, self._schedule)

    def _trust(self, arm: str, seed: int, rate: float) -> float:
        """Run one case if it has not been, and return its loss on the trust splits."""
        case = self._case(arm, seed, rate)
        found = self._read(case)
        if found is None:
            found = ARMS[arm].run(self._fleet(seed), self._schedule, rate)
            case.write(found)
            print(
                f"{self._dataset} {self._model} seed {seed} rate {rate:g} {arm}: "
                f"{found.held_out:.4f} (trust {found.trust:.4f}, {found.seconds:.0f} s)",
                flush=True,
            )
        return found.trust

    def _read(self, case: Case) -> Result | None:
        """Return what a case has come to, here or in what was published."""
        name = case.path.name
        found = case.read() or self._published.get(name)
        if found is not None:
            self.used[name] = found
        return found

    def _fleet(self, seed: int) -> Simulation:
        if seed not in self._fleets:
            self._fleets[seed] = open_fleet(
                self._data, self._dataset, self._model, self._schedule, seed=seed
            )
        return self._fleets[seed]


if __name__ == "__main__":
    main()
