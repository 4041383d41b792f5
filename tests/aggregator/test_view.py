"""What status commands, metrics and the page see of a state: the store's numbers, at any size."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from aggregator.errors import StoreError
from aggregator.issued import TrustMatrix
from aggregator.rounds import Policy, RoundState
from aggregator.steering import Steering
from aggregator.store import Store
from aggregator.view import FleetReader, StateView
from aggregator.view.words import Cohort, Standing, device_waits_for, duration, job_waits_for
from protocol.files import lock_folder
from protocol.messages import Status
from protocol.signing import SigningKey
from protocol.tensors import encode
from tests.aggregator.uploading import DEVICE, OPEN, Aggregator, make_job, update

POLICY = Policy(min_devices=3, quorum=2, deadline_s=60.0)


def served(folder: Path) -> tuple[Aggregator, int]:
    """Return an aggregator in whose round one update counts, and that update's size in bytes."""
    aggregator = Aggregator(folder, make_job())
    aggregator.greet()
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data, metrics={"held_out_loss": 2.5})
    assert aggregator.deliver(manifest, data)[0].kind == "done"
    return aggregator, len(data)


def test_a_view_has_the_numbers_of_the_store(tmp_path: Path) -> None:
    aggregator, size = served(tmp_path / "notes")
    store = aggregator.store
    store.set_policy(POLICY)
    with StateView(tmp_path / "notes") as view:
        job = view.job()
        assert (job.name, job.state, job.round, job.rounds) == ("notes", "open", 1, 6)
        assert (job.version, job.delivered, job.refused) == (1, 1, 0)
        assert (job.policy, job.paused, job.process) == (POLICY, None, None)
        version = store.version(1)
        assert version is not None
        down = sum(band.bytes for band in version.bands.values())
        assert (job.up_bytes, job.down_bytes) == (size, down), "it held all 128 directions"
        (one,) = view.devices()
        assert (one.name, one.online, one.up_bytes, one.rounds) == (DEVICE, True, size, 1)
        assert one.last_seen is not None and abs(time.time() - one.last_seen) < 60
        assert one.waiting_for == "has delivered for round 1"
        found = view.device(DEVICE)
        assert found is not None and found.plan is not None
        assert (found.plan.rank, found.plan.held, found.plan.modules) == (64, 128, 2)
        assert [(h.round, h.counted, h.loss) for h in found.history] == [(1, True, 2.5)]
        assert view.device("nobody") is None

        merged = RoundState(2, "open", 2, None)
        store.finish_round(
            merged,
            version.model_copy(update={"version": 2, "parent": 1}),
            number=1,
            seconds=0.5,
            weights={DEVICE: 1.0},
            residual=0.25,
        )
        newest, first = view.rounds()
        assert (newest.number, newest.version, newest.counted) == (2, None, 0)
        assert newest.opened is not None and newest.ended is None
        assert (first.number, first.version, first.merge_s, first.loss) == (1, 2, 0.5, 2.5)
        assert (first.ranks, first.counted, first.up_bytes) == ({64: 1}, 1, size)
        assert view.rounds(before=2, limit=5) == [first]
        whole = view.round(1)
        assert whole is not None and whole.weights == {DEVICE: 1.0}
        assert [v.version for v in view.versions()] == [2, 1]
        assert view.versions()[0].bytes == down
        assert view.job().round == 2, "the same view sees what was written since"


def test_what_is_refused_is_told_until_something_counts(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path / "notes", make_job())
    aggregator.greet()
    data = encode(update(aggregator.job), "f32")
    assert aggregator.offer(aggregator.manifest(data, encoding="bf16"))[0].kind == "reject"
    with StateView(tmp_path / "notes") as view:
        (one,) = view.devices()
        assert "its encoding is bf16" in one.last_error
        assert (one.strikes, view.job().refused) == (1, 1)
        aggregator.deliver(aggregator.manifest(data), data)
        (one,) = view.devices()
        assert (one.last_error, one.rounds) == ("", 1)
        (row,) = view.round_devices(1)
        assert (row.counted, row.refused, "its encoding" in row.reason) == (True, 1, True)


def test_trust_is_there_by_round(tmp_path: Path) -> None:
    store = served(tmp_path / "notes")[0].store
    matrix = TrustMatrix(["a", "b"], [[0.7, 0.3], [0.2, 0.8]], {"a": 1.0}, [[None, 0.1], [0.2, 0]])
    store.issued.add_trust(3, matrix)
    with StateView(tmp_path / "notes") as view:
        assert (view.trust_rounds(), view.trust(3), view.trust(2)) == ([3], matrix, None)


def test_a_view_and_the_daemon_hold_nobody_up(tmp_path: Path) -> None:
    store = served(tmp_path / "notes")[0].store
    with StateView(tmp_path / "notes") as view:
        with store.transaction():  # as the daemon is while it takes in what has come
            store.set_round(RoundState(1, "open", 1, None, attempt=1))
            assert view.job().attempt == 0, "not committed, and read all the same"
        with view.snapshot():
            assert view.job().attempt == 1
            store.set_round(RoundState(1, "open", 1, None, attempt=2))  # would time out
            assert view.job().attempt == 1, "one moment"
        assert view.job().attempt == 2
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            view._db._db.execute("DELETE FROM devices")


@pytest.mark.parametrize("many", [0, 6, 5000])
def test_any_number_of_devices(tmp_path: Path, many: int) -> None:
    job = make_job()
    store = Aggregator(tmp_path / "notes", job).store
    key = SigningKey.generate().public
    states = ["idle", "training", "waiting", "unfit", "stopped"]
    with store.transaction():
        for number in range(many):
            state = states[number % 5]
            name = f"device-{number:04}"
            told = {"state": state, "rank": number % 3, "detail": "charging"}
            online = state != "stopped"
            store.devices.set_status(
                Status(job="notes", device=name, online=online, boot=1, **told), key
            )
        for number in range(0, many, 100):
            store.devices.strike(f"device-{number:04}", 1, time.time() + 3600)
    with StateView(tmp_path / "notes") as view:
        counts = view.counts()
        each = [len(range(first, many, 5)) for first in range(5)]
        assert sum(counts.by_state.values()) == counts.known == many
        assert counts.online == many - each[4] and counts.quarantined == len(range(0, many, 100))
        assert counts.by_state.get("offline", 0) == each[4]
        assert counts.ready == len(view.ready()) == each[0] + each[1] - counts.quarantined
        assert view.ready() == store.devices.ready() - store.devices.quarantined(time.time())
        seen: list[str] = []
        while page := view.devices(offset=len(seen), limit=999):
            seen += [one.name for one in page]
        assert seen == [f"device-{number:04}" for number in range(many)]
        assert len(view.devices(state="waiting", limit=10_000)) == each[2]
        assert len(view.devices(state="quarantined", limit=10_000)) == counts.quarantined
        assert len(view.devices(search="-000", limit=10_000)) == min(many, 10)
        ranks = [one.rank for one in view.devices(order="rank", descending=True)]
        assert ranks == sorted(ranks, reverse=True) and len(ranks) == min(many, 100)
        with pytest.raises(ValueError, match="no order of devices"):
            view.devices(order="name; DROP TABLE devices")


def test_what_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no aggregator's state in .*aggregator serve"):
        StateView(tmp_path)
    Store(tmp_path / "fresh").close()
    with (
        StateView(tmp_path / "fresh") as view,
        pytest.raises(StoreError, match="no job has been served"),
    ):
        view.job()
    old = tmp_path / "old" / "store.sqlite"
    old.parent.mkdir()
    sqlite3.connect(old).execute("CREATE TABLE meta (key TEXT)").connection.close()
    with pytest.raises(StoreError, match="earlier version's"):
        StateView(old.parent)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "store.sqlite").write_bytes(b"no database" * 100)
    served(tmp_path / "notes")
    reader = FleetReader(tmp_path)
    fleet = reader.fleet()
    assert [job.name for job in fleet.jobs] == ["notes"] and len(fleet.unreadable) == 3
    assert reader.find("").settings()["job"] == "notes"
    with pytest.raises(StoreError, match=r"no job 'letters' here; name one of notes"):
        reader.find("letters")
    reader.close()


def test_of_two_states_of_one_job_the_served_one_is_shown(tmp_path: Path) -> None:
    served(tmp_path)  # by `serve job.toml`, in the same folder
    served(tmp_path / "notes")
    with closing(FleetReader(tmp_path)) as reader:
        assert reader.find("notes").folder == tmp_path / "notes"
        assert [job.folder for job in reader.fleet().jobs] == [str(tmp_path / "notes")]
    with lock_folder(tmp_path, "aggregator"), closing(FleetReader(tmp_path)) as reader:
        assert reader.find("notes").folder == tmp_path
        assert [job.folder for job in reader.fleet().jobs] == [str(tmp_path)]


def test_why_a_job_waits() -> None:
    def said(state: RoundState, ready: int, delivered: int = 0, **more: bool) -> str:
        cohort = Cohort(ready, ready, delivered, delivered, delivered)
        told = {"paused": False, **more}
        return job_waits_for(state, POLICY, cohort, now=100.0, **told)

    waiting, late = RoundState(0, "waiting", 1, None), RoundState(1, "open", 1, 50.0)
    assert said(waiting, 1) == "devices: 1 of 3 are ready"
    assert said(RoundState(1, "open", 1, 700.0), 5, 1) == (
        "updates: 1 of the quorum of 2; the deadline is in 10 min"
    )
    assert said(late, 5, 2) == "devices: 2 of 5 asked have delivered; the deadline has passed"
    assert said(late, 5, paused=True) == "to be resumed: the job is paused"
    assert said(RoundState(6, "finished", 7, None), 5).startswith("nothing")
    spans = [duration(s) for s in (45, 3600, 3 * 3600 + 60, 3 * 86400)]
    assert spans == ["45 s", "60 min", "3 h 1 min", "3 d 0 h"]


def test_why_a_device_waits() -> None:
    well = {
        "online": True, "state": "idle", "detail": "", "revoked": False, "quarantined": False,
        "drawn": True, "delivered": False,
    }  # fmt: skip

    def said(state: RoundState = OPEN, paused: bool = False, **more: object) -> str:
        return device_waits_for(Standing(**{**well, **more}), state, paused=paused)  # type: ignore[arg-type]

    assert said() == "" and said(state="open" and OPEN, drawn=False) == "not drawn for round 1"
    assert said(online=False) == "offline"
    assert said(revoked=True).startswith("revoked")
    assert said(quarantined=True).startswith("kept out")
    told = {"state": "waiting", "detail": "the battery is at 12 %"}
    assert device_waits_for(Standing(**{**well, **told}), OPEN, paused=False) == (  # type: ignore[arg-type]
        "waits: the battery is at 12 %"
    )
    assert said(paused=True) == "the job is paused"
    assert said(delivered=True) == "has delivered for round 1"


def test_what_was_changed_is_told_apart_from_the_file(tmp_path: Path) -> None:
    store = served(tmp_path / "notes")[0].store
    store.set_policy(POLICY)
    store.set_steering(Steering(paused=123.0, changed={"quorum": 4}))
    with StateView(tmp_path / "notes") as view:
        job = view.job()
        assert (job.policy.quorum, job.policy.fraction) == (4, 1.0)
        assert (job.changed, job.paused, job.deadline) == ({"quorum": 4}, 123.0, None)
        assert view.devices()[0].waiting_for == "has delivered for round 1"
