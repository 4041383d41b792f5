"""Training ends with its agent, even in the middle of a step that takes hours."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

AGENT = """
import sys
from pathlib import Path

import base_tiny
from edge_client.model import describe_model
from edge_client.plan import Plan
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text
from protocol.adapter import initial_adapter
from protocol.messages import Training

process = TrainingProcess()
plan = Plan(2, 4, 1, 64, False, "f32", 1, 0.0, 0.0)
process.call("open", model=base_tiny.PATH, text=Text((Path(sys.argv[1]),), 0), plan=plan)
whole = initial_adapter(describe_model("base-tiny").modules, 4, 1.0, seed=0)
process.call("load", trained=whole.truncated(2), frozen=None)
print(process._process.pid, flush=True)
hours = Training(steps=1, tokens_per_step=1 << 24, max_tokens=64)
process.call("train", stream="fleet", settings=hours, learning_rate=1e-3, pruning=None)
"""


@pytest.mark.timeout(240)  # 15 s where nobody else uses the machine
def test_a_step_does_not_outlive_the_agent(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"page {n}: " + f"said {n} times. " * 20 for n in range(20)))
    command = [sys.executable, "-c", AGENT, str(text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        training = psutil.Process(int(agent.stdout.readline()))
        time.sleep(1)  # by now it has been asked to train and says nothing before the step's end
        assert training.is_running()
        agent.kill()
        assert psutil.wait_procs([training], timeout=60)[1] == []
