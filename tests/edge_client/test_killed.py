"""The kernel kills a training process: a real agent steps down and goes on with its round."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from device_profiles.demo_text import write_demo_text
from device_profiles.processes import Event, Processes
from edge_client.outbox import Outbox
from protocol.transport import BrokerAddress

JOB = {
    "job": "notes",
    "model": "base-tiny",
    "rounds": 1,
    "ladder": [2, 4],
    "training": {"steps": 3, "tokens_per_step": 256, "max_tokens": 128},
    "policy": {"min_devices": 1, "quorum": 1},
}


def training_process(agent: psutil.Process) -> psutil.Process:
    """Return the agent's child that trains: the other one tracks multiprocessing's resources."""
    (found,) = [c for c in agent.children() if "spawn_main" in " ".join(c.cmdline())]
    return found


@pytest.mark.timeout(240)
def test_a_killed_training_process_is_followed_by_a_smaller_one_in_the_same_round(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    write_demo_text(tmp_path / "text", seed=0)
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    broker = f"mqtt://{mosquitto.host}:{mosquitto.port}"
    serve = ["serve", tmp_path / "job.json", "--state", tmp_path / "server", "--json"]
    run = ["run", "--json", "--exit-when-done", "--name", "phone", "--threads", 1]
    run += ["--data", tmp_path / "text" / "email", "--state", tmp_path / "phone"]
    run += ["--profile", "laptop-16gb", "--broker", broker]
    seen: list[Event] = []
    with Processes(tmp_path / "events.jsonl", tmp_path) as processes:
        processes.start("aggregator", "aggregator", [*serve, "--broker", broker])
        processes.start("phone", "edge_client", run)
        agent = psutil.Process(processes.pid("phone"))
        killed = 0
        for event in processes.events(200):
            seen.append(event)
            if event["event"] == "step" and event["step"] == 2 and not killed:
                killed = training_process(agent).pid
                os.kill(killed, signal.SIGKILL)
            if event["event"] == "finished":
                break
    by_name: dict[str, list[Event]] = {}
    for event in seen:
        by_name.setdefault(event["event"], []).append(event)
    (plan,) = by_name["plan"]
    (down,) = by_name["stepped-down"]
    assert down["before"] == plan["plan"] != down["plan"]
    assert down["predicted_before_mib"] == plan["predicted_mib"] > down["predicted_mib"]
    steps = [event["step"] for event in by_name["step"]]
    assert steps[:2] == [1, 2]
    assert steps[-3:] == [1, 2, 3]
    (counted,) = by_name["counted"]
    assert counted["round"] == 1
    (end,) = by_name["finished"]
    assert end["predicted_mib"] == down["predicted_mib"]
    outbox = Outbox(tmp_path / "phone")
    assert outbox.ceiling_mib("notes") == pytest.approx(plan["predicted_mib"], abs=0.01)
    outbox.close()
