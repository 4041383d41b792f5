"""What is left of personal adapters: on the broker, in the state folder, after a crash."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from aggregator.places import Place, common
from aggregator.withdraw import withdraw
from protocol.messages import GlobalManifest, Round
from tests.aggregator.personal.conftest import SIZES, Fleet
from tests.faults.rows import PERSONAL_ALONE

pytestmark = pytest.mark.timeout(300)
Begin = Callable[..., Fleet]
AROUND = (
    "aggregator.merge.before",
    "aggregator.merge.after",
    "aggregator.version.written",
    "aggregator.round.settling",
    "aggregator.round.committed",
    "aggregator.version.publishing",
    "aggregator.version.published",
    "file.renamed",
)
"""Points of a merge that are there with any rule."""


def losses(what: str, now: Round) -> float | None:
    """Tell something else each round, the same each time the round is run."""
    told = {"received": 2.0, "trial": 1.5 + 0.3 * (now.number % 3), "0": 1.9, "1": 2.2, "2": 1.7}
    return told.get(what)


def digest(folder: Path) -> dict[str, str]:
    """Return the hash of every file in the folders of adapters."""
    files = [p for name in ("versions", "personal") for p in (folder / name).rglob("*.safetensors")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def outcome(fleet: Fleet) -> dict[str, Any]:
    """Return all that a job has come to, but for when."""
    store = fleet.store()
    last = store.round().version
    state = json.loads(store.issued.trust_state() or "")
    trust = [store.issued.trust(number) for number in range(1, last)]
    return {"files": digest(fleet.state), "version": last, "state": state, "trust": trust}


def test_what_is_too_old_goes_from_broker_and_state(fleet_of: Begin) -> None:
    fleet = fleet_of("trust-validation", rounds=6, rule_settings={"candidates": 2})
    job = json.loads((fleet.folder / "job.json").read_text())
    job["policy"]["keep_versions"] = 3
    (fleet.folder / "job.json").write_text(json.dumps(job))
    fleet.serve()
    for name in SIZES:
        fleet.join(name, losses)
    fleet.run_rounds(2)
    fleet.devices.pop("den").leave()  # with an adapter of its own, of version 3
    fleet.run_rounds(6)
    attic, rest = fleet.devices["attic"], ("attic", "barn", "cellar")
    fleet.run(lambda: common(5) not in attic.places())
    mine = {
        Place("personal", 6, "attic"),
        Place("personal", 7, "attic"),
        Place("trial", 6, "attic"),
        Place("trial", 7, "attic"),
    }
    offered = {Place("candidate", 6, "0"), Place("candidate", 6, "1")}
    shared = {common(6), common(7)}
    print("X", attic.places() - (mine | offered | shared))
    fleet.run(lambda: attic.places() <= mine | offered | shared)
    assert attic.places() == mine | offered | shared, "no candidates after the last round"
    assert fleet.aggregators[0].wait() == 0
    named = {Place("personal", n, name) for n in (5, 6, 7) for name in rest}
    named |= {Place("personal", 3, "den")} | offered
    named |= {Place("trial", n, name) for n in (6, 7) for name in rest}
    assert fleet.store().issued.places() == named
    files = (fleet.state / "personal").rglob("*.safetensors")
    on_disk = {str(path.parent.relative_to(fleet.state)) for path in files}
    assert on_disk == {str(place.folder) for place in named}
    assert withdraw(fleet.broker, "notes", force=True).left == 0
    fleet.run(lambda: not attic.kept)


def test_killed_at_any_point_of_a_merge_the_versions_are_the_same(fleet_of: Begin) -> None:
    def run(points: Sequence[str] = ()) -> dict[str, Any]:
        fleet = fleet_of("trust-validation", rounds=4, rule_settings={"candidates": 3})
        lives = [*points, ""]
        fleet.serve(lives[0])
        for name in SIZES:
            fleet.join(name, losses)
        for life, point in enumerate(lives):
            aggregator = fleet.aggregators[life]
            fleet.run(lambda one=aggregator: one.process.poll() is not None)
            assert aggregator.wait() == (-signal.SIGKILL if point else 0), (
                point,
                aggregator.stderr,
            )
            if point:
                fleet.serve(lives[life + 1])
        found = outcome(fleet)
        withdraw(fleet.broker, "notes", force=True)
        for device in fleet.devices.values():
            device.close()
        fleet.devices.clear()
        return found

    undisturbed = run()
    assert undisturbed["version"] == 5
    assert any(name.startswith("personal/5/personal/") for name in undisturbed["files"])
    every = [
        f"{point}:{2 if point in PERSONAL_ALONE else 1}" for point in (*PERSONAL_ALONE, *AROUND)
    ]
    for at in range(0, len(every), 4):
        assert run(every[at : at + 4]) == undisturbed, every[at : at + 4]


def test_a_broker_that_forgot_is_told_all_that_is_current(fleet_of: Begin) -> None:
    fleet = fleet_of("trust-weights", rounds=3)
    fleet.serve()
    for name in SIZES:
        fleet.join(name, losses)
    fleet.run_rounds(1)
    fleet.devices.pop("den").leave()
    fleet.run_rounds(2)
    assert fleet.aggregators[0].end(signal.SIGTERM) == 0
    attic = fleet.devices["attic"]
    before = attic.places() - {common(2), Place("personal", 2, "attic"), Place("trial", 2, "attic")}
    withdraw(fleet.broker, "notes", force=True)
    fleet.run(lambda: not attic.places())
    fleet.serve()
    fleet.run(lambda: attic.places() == before)
    den = fleet.join("den")
    fleet.run(lambda: Place("personal", 2, "den") in den.places())
    manifest = attic.manifest(common(3))
    assert isinstance(manifest, GlobalManifest) and manifest.personal["den"] == 2
