"""Who is ready and who has answered is kept up in memory: it is what the rows say, always."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from aggregator.rounds import Policy, RoundState, next_action
from aggregator.store import Store
from protocol.cohort import in_cohort
from protocol.messages import Status, UploadManifest, describe_file, upload_id

DATA = b"x" * 100


class Undone(Exception):
    """Roll a transaction back."""


def status(device: str, state: str = "idle", *, online: bool = True) -> Status:
    return Status.model_validate(
        {"job": "notes", "device": device, "online": online, "boot": 1, "state": state}
    )


def manifest(device: str, *, attempt: int = 0, number: int = 1) -> UploadManifest:
    return UploadManifest(
        job="notes", device=device, upload=upload_id(device, "notes", number, attempt),
        round=number, attempt=attempt, version=number, rank=2, rank_trained=2, held=2,
        encoding="bf16", file=describe_file(DATA), examples=1,
    )  # fmt: skip


def deliver(store: Store, device: str) -> None:
    update = manifest(device)
    store.uploads.expect(update)
    store.uploads.add_chunk(update, 0, DATA)
    store.uploads.count(update)


def test_ready_devices(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.devices.set_status(status("a"), "key-a")
    assert store.devices.ready() == {"a"}
    store.devices.set_status(status("b", "training"), "key-b")
    store.devices.set_status(status("c", "waiting"), "key-c")
    assert store.devices.ready() == {"a", "b"}
    store.devices.set_status(status("a", "stopped", online=False), "key-a")
    store.devices.set_status(status("c", "idle"), "key-c")
    assert store.devices.ready() == {"b", "c"}
    with suppress(Undone), store.transaction():
        store.devices.set_status(status("b", online=False), "key-b")
        assert store.devices.ready() == {"c"}
        raise Undone
    assert store.devices.ready() == {"b", "c"}, "what is not committed is not so"
    store.close()
    again = Store(tmp_path)
    assert again.devices.ready() == {"b", "c"}
    again.close()


def answered(store: Store, number: int, attempt: int) -> tuple[set[str], set[str]]:
    """Return whose update counts, and whose was refused."""
    found = store.uploads.answered(number, attempt)
    return found.devices, found.refused


def test_answers_to_a_round(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert answered(store, 1, 0) == (set(), set())
    deliver(store, "a")
    store.uploads.reject(manifest("b"), "bad")
    assert answered(store, 1, 0) == ({"a"}, {"b"})
    assert answered(store, 1, 1) == ({"a"}, set()), "b may try again"
    with suppress(Undone), store.transaction():
        deliver(store, "c")
        raise Undone
    assert answered(store, 1, 1)[0] == {"a"}
    deliver(store, "c")
    assert answered(store, 1, 1)[0] == {"a", "c"}
    late = manifest("d")
    store.uploads.expect(late)
    store.uploads.add_chunk(late, 0, DATA)
    assert answered(store, 2, 0) == (set(), set())
    store.uploads.count(late, late_for=2)
    assert answered(store, 2, 0) == ({"d"}, set())
    assert answered(store, 1, 0)[0] == {"a", "c"}
    store.close()


def test_answers_that_another_process_has_taken_in(tmp_path: Path) -> None:
    store, intake = Store(tmp_path), Store(tmp_path)
    deliver(store, "a")
    assert answered(store, 1, 0) == ({"a"}, set())
    deliver(intake, "b")
    intake.uploads.reject(manifest("c"), "bad")
    assert answered(store, 1, 0) == ({"a", "b"}, {"c"})
    deliver(intake, "d")
    deliver(store, "e")
    assert answered(store, 1, 0) == ({"a", "b", "d", "e"}, {"c"})
    intake.close()
    store.close()


def test_several_updates_of_a_device_in_a_buffered_round(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert not store.uploads.answered(2, 0).updates
    old, new = manifest("a"), manifest("a", number=2)
    for update, late_for in ((old, 2), (new, None)):
        store.uploads.expect(update)
        store.uploads.add_chunk(update, 0, DATA)
        store.uploads.count(update, late_for=late_for, buffered=True)
        kept_up = store.uploads.answered(2, 0)
        assert (kept_up.trained == {"a"}) == (update is new)
    store.uploads.forget_answers()
    assert store.uploads.answered(2, 0) == kept_up
    assert kept_up.updates == {old.upload, new.upload} and kept_up.devices == {"a"}
    store.close()


def test_a_round_of_many_is_merged_when_all_asked_have_answered_and_not_before() -> None:
    fleet = {f"device-{number}" for number in range(2000)}
    now = RoundState(3, "open", 3, 100.0)
    policy = Policy(quorum=1, fraction=0.1)
    asked = sorted(d for d in fleet if in_cohort(d, "notes", 3, 0.1))

    def action(delivered: list[str], refused: list[str], time_s: float = 0.0) -> str | None:
        return next_action(
            now, policy, job="notes", rounds=5, time_s=time_s, online=fleet,
            delivered=delivered, refused=refused,
        )  # fmt: skip

    assert action(asked[:-1], []) is None
    assert action(asked[:-1], asked[-1:]) == "merge"
    assert action([], asked) == "extend", "others may be asked"
    assert action([], asked[:-1]) is None
    assert action([], [], time_s=100.0) == "extend"
    assert action(asked[:1], [], time_s=100.0) == "merge"
