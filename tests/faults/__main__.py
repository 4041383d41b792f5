"""Kill a fleet in every way there is and print what became of its updates: `make faults`.

Real Mosquitto, a real `aggregator serve`, real agents; only training is made up. It takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim, write_claims
from tests.conftest import MOSQUITTO
from tests.faults.audit_personal import SETTINGS, PersonalAuditor
from tests.faults.rig import Rig, running
from tests.faults.rows import Fault, Row, every_point, personal_points, random_instants
from tests.faults.rows_around import around
from tests.faults.rows_disk import full_disks
from tests.faults.rows_power import CutRow, power_cuts
from tests.faults.rows_secure import secured
from tests.faults.secure_rig import HOUSE, SecureRig

KILLS = 500


def every_fault() -> list[Fault]:
    return [*every_point(), *random_instants(), *around()]


def run(rig: Rig, faults: Sequence[Fault], share: float) -> list[Row]:
    """Do all faults, each `share` of its full number of times and once at least."""
    rows = []
    if faults:
        rig.begin()
    for fault in faults:
        began = time.monotonic()
        row = fault.run(rig, max(1, round(fault.times * share)))
        rows.append(row)
        print(
            f"{row.fault:<34} tried {row.tried:>4}  sent {row.sent:>4}  once {row.once:>4}  "
            f"worst {row.worst_s:5.1f} s  in {time.monotonic() - began:5.1f} s  "
            f"{'; '.join(row.problems)}{row.note}",
            flush=True,
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    table = Table(title="faults", title_justify="left")
    for heading in ("fault", "tried", "sent", "once", "twice", "lost after done", "worst recovery"):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    for row in rows:
        counts = (row.tried, row.sent, row.once, row.twice, row.lost)
        table.add_row(row.fault, *map(str, counts), f"{row.worst_s:.1f} s")
    Console(width=110).print(table)


def claims(rows: Sequence[Row], cuts: Sequence[CutRow], kills: int) -> list[Claim]:
    """Return what is claimed of all rows together."""
    dealt = sum(row.kills for row in rows)
    sent, once = sum(r.sent for r in rows), sum(r.once for r in rows)
    twice, lost = sum(r.twice for r in rows), sum(r.lost for r in rows)
    problems = sum(len(row.problems) for row in rows)
    found = [
        Claim("kills and stops in all", dealt, f">= {kills}", dealt >= kills),
        Claim("updates sent, and counted once", f"{sent}, {once}", "as many", sent == once),
        Claim("updates counted twice", twice, "0", twice == 0),
        Claim("updates lost after done", lost, "0", lost == 0),
        Claim("other breaches", problems, "0", problems == 0),
        Claim("worst recovery, seconds", max(r.worst_s for r in rows), "told", True),
    ]
    for cut in cuts:
        claim = f"bytes sent again after {cut.fault}, worst of {cut.tried}"
        found.append(Claim(claim, cut.worst_bytes, f"<= {cut.bound_bytes}", cut.good))
    return found


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    arguments.add_argument("--kills", type=int, default=KILLS, help="about how many in all")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--quick", action="store_true", help="each fault once")
    arguments.add_argument("--only", default="", help="faults with this in their name")
    given = arguments.parse_args()
    if MOSQUITTO is None:
        print("error: mosquitto is not installed; make mosquitto", file=sys.stderr)
        return 1
    faults = [f for f in every_fault() if given.only in f.name]
    personal = [f for f in personal_points() if given.only in f.name]
    full = [f for f in full_disks() if given.only in f.name]
    certified = [f for f in secured() if given.only in f.name]
    share = 0.0 if given.quick else given.kills / KILLS
    with tempfile.TemporaryDirectory() as folder:
        with running(Path(folder) / "fleet", given.seed) as rig:
            rows = run(rig, faults, share)
        with running(Path(folder) / "own", given.seed, auditor=PersonalAuditor, **SETTINGS) as rig:
            rows += run(rig, personal, share)
        with running(Path(folder) / "disks", given.seed) as rig:
            rows += run(rig, full, share)
        with running(Path(folder) / "house", given.seed, HOUSE, kind=SecureRig) as rig:
            rows += run(rig, certified, share)
        cuts = [] if given.only else power_cuts(Path(folder), given.seed, 1 if given.quick else 5)
    show(rows)
    for row in rows:
        for problem in row.problems:
            print(f"PROBLEM {row.fault}: {problem}")
    kills = 0 if given.quick or given.only else given.kills
    made = claims(rows, cuts, kills)
    write_claims("faults", made, rows=[asdict(r) for r in rows], cuts=[asdict(c) for c in cuts])
    return 0 if all(claim.met for claim in made) else 1


if __name__ == "__main__":
    raise SystemExit(main())
