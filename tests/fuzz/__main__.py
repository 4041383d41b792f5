"""Feed every parser many inputs and print what came of it: `python -m tests.fuzz`."""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

from tests.fuzz.feeding import Fault, traced
from tests.fuzz.parsers import all_parsers


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    arguments.add_argument("--inputs", type=int, default=100_000, help="over all parsers")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", default="", help="parsers with this in their name")
    given = arguments.parse_args()
    warnings.simplefilter("error", RuntimeWarning)
    faults = []
    with tempfile.TemporaryDirectory() as folder, all_parsers(Path(folder)) as every, traced():
        parsers = [p for p in every if given.only in p.name]
        print(f"{'parser':<26}{'inputs':>8}{'accepted':>10}{'refused':>9}{'KiB':>8}{'s':>7}")
        for parser in parsers:
            began = time.monotonic()
            try:
                parser.run(-(-given.inputs // len(parsers)), given.seed)
            except Fault as fault:
                faults.append(fault)
            inputs = parser.accepted + parser.refused
            print(
                f"{parser.name:<26}{inputs:>8}{parser.accepted:>10}{parser.refused:>9}"
                f"{parser.worst / 1024:>8.0f}{time.monotonic() - began:>7.1f}",
                flush=True,
            )
        print(f"{'all':<26}{sum(p.accepted + p.refused for p in parsers):>8}")
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
