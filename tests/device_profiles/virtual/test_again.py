"""The same seed gives the same, bit for bit; a run is replayed from its log; two are compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from device_profiles.errors import ReplayError
from device_profiles.virtual import broker
from device_profiles.virtual.command import run_again
from device_profiles.virtual.compare import Run as Kept
from device_profiles.virtual.compare import same_result, table, write_picture
from device_profiles.virtual.options import FILE, Options
from protocol.transport import BrokerAddress, MqttTransport
from tests.device_profiles.virtual.conftest import Run

CHURN = Options(scenario="device-churn", devices=6, seed=3, resolution_s=2)
POLICY = {"min_devices": 2, "quorum": 2, "deadline_s": 600}


def test_the_same_seed_gives_the_same_adapter_and_another_one_another(
    replay: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = replay(CHURN, rounds=2, policy=POLICY)
    other = replay(CHURN, rounds=2, policy=POLICY)
    assert one.result["adapter_sha256"] == other.result["adapter_sha256"]
    assert [r["updates_sha256"] for r in one.rounds] == [r["updates_sha256"] for r in other.rounds]
    assert [r["merged_s"] for r in one.rounds] == [r["merged_s"] for r in other.rounds]

    def by_device(events: list[dict[str, object]]) -> list[str]:
        mine = [e for e in events if not str(e["event"]).startswith("aggregator.")]
        return sorted(json.dumps(e, sort_keys=True) for e in mine)

    assert by_device(one.events) == by_device(other.events), "at the same times"
    third = replay(replace(CHURN, seed=4), rounds=2, policy=POLICY)
    assert third.result["adapter_sha256"] != one.result["adapter_sha256"]
    kept = [Kept(run.folder) for run in (one, other, third)]
    assert same_result(*kept[:2])[0] and not same_result(kept[0], kept[2])[0]
    rows = {name: (a, b) for name, a, b in table(kept[0], kept[2])}
    assert rows["seed"] == ("3", "4")
    write_picture(kept[0], kept[2], tmp_path / "two.html")
    page = (tmp_path / "two.html").read_text()
    assert "Plotly.newPlot" in page and "https://" not in page.split("<script>")[0]

    assert run_again(one.folder, tmp_path / "again", as_json=False)
    assert "the same adapter, bit for bit" in capsys.readouterr().out
    result = one.folder / "result.json"
    result.write_text(result.read_text().replace(one.rounds[0]["updates_sha256"], "0" * 64))
    assert not run_again(one.folder, tmp_path / "again", as_json=False)
    assert "other updates counted (4 and 4 updates)" in capsys.readouterr().out


def test_what_has_changed_since_is_not_replayed(
    replay: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replay(replace(CHURN, devices=2), rounds=1, policy={"min_devices": 1, "quorum": 1})
    log = run.folder / FILE
    known = log.read_text()
    name = next(iter(json.loads(known)["traces"]))
    record = json.loads(known)
    record["traces"][name] = "0" * 64
    log.write_text(json.dumps(record))
    with pytest.raises(ReplayError, match="traces have changed since"):
        run_again(run.folder, tmp_path / "again", as_json=False)
    log.write_text(known)
    (run.folder / "result.json").unlink()  # as where the replay had failed
    capsys.readouterr()
    assert run_again(run.folder, tmp_path / "again", as_json=False)
    assert "had come to no result" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(run.folder / "pool")
    record = json.loads(known)
    record["options"]["pool"] = str(tmp_path / "no such")
    log.write_text(json.dumps(record))
    with pytest.raises(ReplayError, match="no such"):
        run_again(run.folder, tmp_path / "again", as_json=False)
    with pytest.raises(ReplayError, match="holds no replay of traces"):
        run_again(tmp_path, tmp_path / "again", as_json=False)


def test_a_broker_of_ones_own_is_left_as_it_was(replay: Run, mosquitto: BrokerAddress) -> None:
    policy = {"min_devices": 2, "quorum": 1, "deadline_s": 600}
    options = replace(CHURN, devices=3, broker=str(mosquitto))
    first = replay(options, rounds=1, policy=policy)
    second = replay(options, rounds=1, policy=policy)
    assert first.result["adapter_sha256"] == second.result["adapter_sha256"]
    scout = MqttTransport(mosquitto, "scout")
    scout.connect()
    scout.subscribe(["tunefleet/#"])
    assert scout.receive(0.5) is None, "nothing of the replay is retained"
    scout.close()


def test_without_mosquitto_it_says_what_to_install(
    replay: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "find_mosquitto", lambda: None)
    with pytest.raises(ReplayError, match=r"install it .*apt install mosquitto.*--broker"):
        replay(CHURN, rounds=1, policy={"min_devices": 2, "quorum": 2, "deadline_s": 600})
