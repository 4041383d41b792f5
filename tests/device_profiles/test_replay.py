"""The main job in small, through Mosquitto with MQTT 5: processes, training, merge, files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import base_tiny
from aggregator.kept import kept_messages
from device_profiles.backends import mix
from device_profiles.demo_text import write_demo_text
from device_profiles.errors import FleetError, ReplayError
from device_profiles.fleet import FleetDevice, demo_fleet, read_fleet
from device_profiles.replay import name_latest, new_run_folder, run_folder
from edge_client.data import read_examples, split_examples
from protocol.transport import BrokerAddress, MqttTransport
from tests.edge_client.ort.artifacts import needs_onnx

FLEET = """
rounds = 3

[training]
steps = 2
tokens_per_step = 256

[[device]]
name = "small"
profile = "raspberry-pi-3b-plus-1gb"
data = "text/markup"

[[device]]
name = "large"
profile = "laptop-16gb"
data = "text/email"
"""


def fleet_replay(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "device_profiles.cli", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=570)


def kept_on(broker: BrokerAddress) -> list[str]:
    link = MqttTransport(broker, "test-look", temporary=True)
    link.connect()
    try:
        return [m.topic for m in kept_messages(link, "replay", ["tunefleet/#"])]
    finally:
        link.close()


def plain_losses(adapter: Path, text: Path, parts: Sequence[str]) -> dict[str, float]:
    """Return the held-out losses of an adapter, nats a token, with nothing of ours but the split.

    Each text by itself between the model's first and last token, in pieces of 256 tokens: no
    packing, masks or positions. That is what a packed row's loss is documented to be.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_tiny.PATH)
    base = AutoModelForCausalLM.from_pretrained(base_tiny.PATH, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    losses = {}
    for part in parts:
        held_out = split_examples(read_examples([text / part]).examples, seed=0).held_out
        total, counted = 0.0, 0
        for example in held_out:
            words = tokenizer(example.payload, add_special_tokens=False)["input_ids"]
            ids = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
            for start in range(0, len(ids) - 1, 256):
                asked, answers = ids[start : start + 256], ids[start + 1 : start + 257]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([asked])).logits[0, : len(answers)]
                chances = logits.double().log_softmax(-1)
                total -= float(chances[range(len(answers)), answers].sum())
                counted += len(answers)
        losses[part] = total / counted
    return losses


@pytest.mark.timeout(600)  # 90 s where nobody else uses the machine
def test_a_fleet_learns_through_mosquitto(tmp_path: Path, mosquitto: BrokerAddress) -> None:
    write_demo_text(tmp_path / "text", seed=0)
    (tmp_path / "fleet.toml").write_text(FLEET)
    out = tmp_path / "runs"
    broker = f"mqtt://{mosquitto.host}:{mosquitto.port}"
    done = fleet_replay("run", tmp_path / "fleet.toml", "--broker", broker, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert kept_on(mosquitto) == [], "the job is off the broker again"
    events = [json.loads(line) for line in done.stdout.splitlines()]
    summary = json.loads((out / "latest" / "summary.json").read_text())
    assert {k: v for k, v in events[-1].items() if k != "event"} == summary

    ranks = {d["name"]: d["rank_start"] for d in summary["devices"]}
    assert ranks["small"] < ranks["large"]
    for device in summary["devices"]:
        assert device["peak_mib"] == pytest.approx(device["predicted_mib"], rel=0.25)
        assert device["loss"]["merged"] < device["loss"]["base"]
        # float32 through PEFT here, the plan's dtype on the device
        held_all = device["held_rank"] == summary["rank_max"]
        if held_all:
            assert device["loss"]["merged"] == pytest.approx(
                device["loss"]["merged_on_device"], abs=5e-3
            )
    plain = plain_losses(out / "latest" / "adapter", tmp_path / "text", ["markup", "email"])
    merged = {d["name"]: d["loss"]["merged"] for d in summary["devices"]}
    assert merged["small"] == pytest.approx(plain["markup"], abs=1e-3)
    assert merged["large"] == pytest.approx(plain["email"], abs=1e-3)
    counted = [e for e in events if e["event"] == "counted"]
    assert len(counted) == 6
    assert [e["round"] for e in events if e["event"] == "merged"] == [1, 2, 3]
    (measuring,) = [e for e in events if e["event"] == "measuring"]
    assert measuring == {"event": "measuring", "adapters": 3, "texts": 2}
    assert (out / "latest" / "report.html").stat().st_size > 100_000
    assert (out / "latest" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.timeout(600)  # 60 s where nobody else uses the machine
def test_a_replay_whose_every_update_is_refused_says_so_and_ends(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    write_demo_text(tmp_path / "text", seed=0)
    (tmp_path / "fleet.toml").write_text(FLEET)
    done = fleet_replay(
        "run", tmp_path / "fleet.toml", "--broker", f"mqtt://{mosquitto.host}:{mosquitto.port}",
        "--set", "limits.update_norm=1e-6", "--rule", "hetlora", "--out", tmp_path / "runs",
    )  # fmt: skip
    assert done.returncode != 0
    why = r"over limits.update_norm = 1e-06"
    assert re.search(rf"round 1: the update of small was refused: it moves .*{why}", done.stdout)
    assert re.search(rf"error: every device's update of round 1 was refused: .*{why}", done.stderr)
    assert 'note: hetlora as published: remainder = "dropped"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(600)  # 90 s where nobody else uses the machine
def test_a_replay_measures_the_devices_own_adapters(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    write_demo_text(tmp_path / "text", seed=0)
    (tmp_path / "fleet.toml").write_text(FLEET)
    out, broker = tmp_path / "runs", f"mqtt://{mosquitto.host}:{mosquitto.port}"
    command = ["run", tmp_path / "fleet.toml", "--broker", broker, "--out", out]
    done = fleet_replay(*command, "--rule", "trust-weights", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "latest" / "summary.json").read_text())
    losses = {device["name"]: device["loss"] for device in summary["devices"]}
    assert summary["loss"]["personal"] == pytest.approx(
        sum(loss["personal"] for loss in losses.values()) / 2
    )
    for name, part in (("small", "markup"), ("large", "email")):
        folder = out / "latest" / "devices" / name
        plain = plain_losses(folder / "adapter", tmp_path / "text", [part])
        assert losses[name]["personal"] == pytest.approx(plain[part], abs=1e-3)
        kept, common = (folder / n / "adapter_model.safetensors" for n in ("adapter", "common"))
        if kept.read_bytes() != common.read_bytes():  # it may do better with the common one
            assert losses[name]["personal"] != pytest.approx(losses[name]["merged"], abs=1e-6)
    assert {"base", "local", "merged", "personal"} == summary["across"].keys()


@needs_onnx
@pytest.mark.timeout(600)
def test_a_mixed_replay_ends_with_the_same_kind_of_table(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    write_demo_text(tmp_path / "text", seed=0)
    fleet = FLEET.replace("raspberry-pi-3b-plus-1gb", "raspberry-pi-4b-4gb")
    (tmp_path / "fleet.toml").write_text(fleet)
    out, broker = tmp_path / "runs", f"mqtt://{mosquitto.host}:{mosquitto.port}"
    command = ["run", tmp_path / "fleet.toml", "--broker", broker, "--out", out]
    done = fleet_replay(*command, "--backend", "mixed")
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime trains small" in done.stdout
    assert re.search(r"device +with +rank", done.stdout)
    summary = json.loads((out / "latest" / "summary.json").read_text())
    devices = {device["name"]: device for device in summary["devices"]}
    assert {name: d["backend"] for name, d in devices.items()} == {
        "small": "onnx",
        "large": "torch",
    }
    assert "onnx" in devices["small"]["plan"]
    for device in devices.values():
        assert device["loss"]["merged"] < device["loss"]["base"]
        assert device["peak_mib"] <= device["budget_mib"]
    assert devices["small"]["floor_mib"] < devices["large"]["floor_mib"] / 2
    round_one, *_ = summary["history"]
    assert set(round_one["devices"]) == set(devices), "one round holds updates of both"


def test_half_of_a_fleet_trains_with_onnx_from_the_least_memory_that_it_fits() -> None:
    fleet = demo_fleet()
    asked: list[str] = []

    def fits(device: FleetDevice) -> bool:
        assert device.backend == "onnx"
        asked.append(device.name)
        return device.name not in ("pi-3b-plus", "pi-4b-2gb")

    found = {device.name: device.backend for device in mix(fleet, fits).devices}
    assert [n for n, b in found.items() if b == "onnx"] == ["pi-4b-4gb", "pi-5", "jetson-nano"]
    assert set(found.values()) == {"torch", "onnx"}
    assert asked == ["pi-3b-plus", "pi-4b-2gb", "pi-4b-4gb", "jetson-nano", "pi-5"]


def test_a_fleet_file_says_what_a_device_trains_with(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for part in ("markup", "email"):
        (tmp_path / "text" / part).write_text("text")
    path = tmp_path / "fleet.toml"
    path.write_text(f'{FLEET}backend = "onnx"\n')
    assert [device.backend for device in read_fleet(path).devices] == ["torch", "onnx"]
    path.write_text(f'{FLEET}backend = "tensorflow"\n')
    with pytest.raises(FleetError, match=r"device 2 \(large\): backend must be torch, onnx, auto"):
        read_fleet(path)


def test_latest_names_the_last_run_unless_something_else_goes_by_that_name(tmp_path: Path) -> None:
    first, second = new_run_folder(tmp_path), new_run_folder(tmp_path)
    assert name_latest(first).resolve() == first
    assert name_latest(second) == tmp_path / "latest"
    assert (tmp_path / "latest").resolve() == second
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert name_latest(second) == second
    assert sorted(tmp_path.iterdir()) == sorted([first, second, tmp_path / "latest"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--broker", "http://x"], "not a broker address"),
        (["demo", "--broker", "mqtt://127.0.0.1:1"], "no MQTT broker"),
        (["demo", "--rule", "nosuch"], "no merge rule 'nosuch'"),
        (["demo", "--seed", "-1"], "the command line: seed: must be at least 0, not -1"),
        (["demo", "--set", "policy.quorum=9"], "waits for more devices than the fleet's 6"),
        (["run", "missing.toml"], "can't read the fleet file"),
        (["demo", "--set", "nonsense"], "write name=value"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = fleet_replay(*arguments, "--out", tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "nothing is made of what can't be run"


def test_a_run_that_fails_leaves_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ReplayError), run_folder(tmp_path):
        raise ReplayError("before anything is kept")
    assert list(tmp_path.iterdir()) == []

    def fail_late() -> None:
        with run_folder(tmp_path) as folder:
            (folder / "log").touch()
            raise ReplayError("what it said is in the log")

    with pytest.raises(ReplayError):
        fail_late()
    assert [path.name for path in tmp_path.glob("*/*")] == ["log"]
