"""One round of a real fleet with updates of both backends, through real processes and a broker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from device_profiles.demo_text import write_demo_text
from device_profiles.processes import Event, Processes
from protocol.transport import BrokerAddress
from tests.edge_client.ort.artifacts import exported, needs_onnx
from tests.edge_client.test_torch_trainer import tiny

JOB = {
    "job": "notes",
    "model": "base-tiny",
    "rounds": 1,
    "ladder": [2, 4],
    "training": {"steps": 4, "tokens_per_step": 128, "max_tokens": 64},
    "policy": {"min_devices": 2, "quorum": 2},
}


@needs_onnx
@pytest.mark.timeout(280)
def test_a_round_holds_updates_of_both_backends(tmp_path: Path, mosquitto: BrokerAddress) -> None:
    artifact = exported(tiny)[1]
    write_demo_text(tmp_path / "text", seed=0)
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    broker = ["--broker", f"mqtt://{mosquitto.host}:{mosquitto.port}"]
    serve = ["serve", tmp_path / "job.json", "--state", tmp_path / "server", "--json", *broker]
    devices = {"phone": ("onnx", "email"), "laptop": ("torch", "markup")}
    finished: dict[str, Event] = {}
    plans: dict[str, Event] = {}
    with Processes(tmp_path / "events.jsonl", tmp_path) as processes:
        processes.start("aggregator", "aggregator", serve)
        for name, (backend, text) in devices.items():
            run = ["run", "--json", "--exit-when-done", "--name", name, "--threads", 1, *broker]
            run += ["--data", tmp_path / "text" / text, "--state", tmp_path / name]
            run += ["--cache", tmp_path / "cache", "--profile", "laptop-16gb"]
            run += ["--backend", backend, "--onnx", artifact]
            processes.start(name, "edge_client", run)
        for event in processes.events(250):
            if event["event"] == "plan":
                plans[event["device"]] = event
            if event["event"] == "finished" and "loss" in event:
                finished[event["device"]] = event
            if len(finished) == len(devices):
                break
    assert {name: plan["backend"] for name, plan in plans.items()} == {
        name: backend for name, (backend, _) in devices.items()
    }
    for device in finished.values():
        assert device["loss"]["merged_on_device"] < device["loss"]["base"]
    # What training took is what was predicted, within the headroom that a plan keeps.
    phone = finished["phone"]
    assert phone["peak_mib"] <= plans["phone"]["needs_mib"]
    assert phone["floor_mib"] < finished["laptop"]["floor_mib"] / 2
