"""How long the three commands take to answer --help: `python -m benchmarks.startup`.

Each is started anew as often as told, in turn, so that what else the machine does falls on all; the
median counts, and the fastest says what the machine can.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim, write_claims

COMMANDS = ("aggregator", "edge-client", "fleet-replay")
LIMIT_S = 0.3
TIMES, TIMES_QUICK = 15, 5


def measure(times: int) -> dict[str, list[float]]:
    """Return command → seconds of each start; a bare interpreter's under "python"."""
    folder = Path(sys.executable).parent
    started: dict[str, list[str]] = {"python": [sys.executable, "-c", "pass"]}
    started |= {name: [str(folder / name), "--help"] for name in COMMANDS}
    taken: dict[str, list[float]] = {name: [] for name in started}
    for _ in range(times + 1):
        for name, command in started.items():
            before = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            taken[name].append(time.perf_counter() - before)
    return {name: seconds[1:] for name, seconds in taken.items()}  # the first one read the disk


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer starts")
    quick = parser.parse_args().quick
    taken = measure(TIMES_QUICK if quick else TIMES)
    table = Table(title="seconds to answer --help", title_justify="left")
    for heading in ("command", "fastest", "median", "slowest"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    for name, seconds in taken.items():
        numbers = (min(seconds), statistics.median(seconds), max(seconds))
        table.add_row(name, *(f"{number:.3f}" for number in numbers))
    Console(width=80).print(table)
    claims = []
    for name in COMMANDS:
        median = statistics.median(taken[name])
        claims.append(
            Claim(f"{name} --help, median seconds", round(median, 3), f"< {LIMIT_S}",
                  median < LIMIT_S)
        )  # fmt: skip
    write_claims("startup", claims, details={"seconds": taken})


if __name__ == "__main__":
    main()
