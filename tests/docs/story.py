"""Go through the commands of README and docs as they stand: a reader's day, in a place of its own.

    unshare --net --mount python -m tests.docs.story FOLDER

The network is one of its own, so the ports are those of the documents, and their hosts are names of
its loopback. FOLDER is home and clone. Each command that has been carried out is printed as a line;
the first that fails ends it, with what it said.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.docs.commands import ROOT

HOSTS = "127.0.0.1 localhost broker.example fleet.example\n"
TEXT = ROOT / "docs/algorithms.md"
TOML = re.compile(r"^```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)
BRIEF = {
    "steps = 50": "steps = 1\ntokens_per_step = 64\nmax_tokens = 64",
    "min_devices = 2": "min_devices = 1",
    "quorum = 2": "quorum = 1",
}
"""What of README's job is made less."""
PATIENCE_S = 240.0


class Story:
    """A reader at a terminal: some commands come to an end, others go on beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "HOME": str(folder),
            "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._beside: list[subprocess.Popen[bytes]] = []

    def run(self, command: str, *, typed: str | None = None, stdin: str = "") -> str:
        """Carry out a command to its end, and return what it said.

        `typed` is what is typed in its place, where it has a placeholder.
        """
        done = subprocess.run(
            ["bash", "-c", typed or command], cwd=self.folder, env=self.environment, text=True,
            input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            timeout=PATIENCE_S,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{command}: status {done.returncode}\n{done.stdout}")
        print(command, flush=True)
        return done.stdout

    def start(self, command: str, until: str, *, typed: str | None = None) -> Callable[[], None]:
        """Begin a command that goes on, wait until it says something; return what ends it."""
        log = self.folder / f"log-{len(self._beside)}.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {typed or command}"], cwd=self.folder, env=self.environment,
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._beside.append(process)
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(until, log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command}: never said {until!r}\n{log.read_text(errors='replace')}")
            time.sleep(0.2)
        print(command, flush=True)

        def end() -> None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                sys.exit(f"{command}: does not end when it is told to")
            if process.returncode not in (0, -signal.SIGTERM):
                sys.exit(f"{command}: ended with {process.returncode}\n{log.read_text()}")

        return end

    def end(self) -> None:
        for process in reversed(self._beside):
            if process.poll() is None:
                process.kill()
                process.wait()


def settle(folder: Path) -> None:
    """Make the clone: an environment, text, README's job cut short, and hosts."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    hosts = folder / "hosts"
    hosts.write_text(HOSTS)
    subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("edge-client", "aggregator", "fleet-replay", "python"):
        (folder / ".venv/bin" / name).symlink_to(Path(sys.executable).parent / name)
    (folder / "notes").mkdir()
    (folder / "notes/notes.md").write_text(TEXT.read_text()[:12_000])
    job = next(b for b in TOML.findall((ROOT / "README.md").read_text()) if b.startswith("job ="))
    for wanted, brief in BRIEF.items():
        assert wanted in job, "README's job has changed: change this too"
        job = job.replace(wanted, brief)
    (folder / "job.toml").write_text(job)


def on_a_broker(story: Story) -> None:
    """README, from a device's profile to an exported adapter."""
    story.run(".venv/bin/edge-client profile")
    story.run(".venv/bin/edge-client export-onnx base-tiny --out base-tiny-onnx")
    (story.folder / "broker.conf").write_text("listener 1883\nallow_anonymous true\n")
    broker = story.start("mosquitto -c broker.conf", "running")
    serving = story.start(
        ".venv/bin/aggregator serve job.toml --broker mqtt://broker.example:1883", "serving"
    )
    # The same text with onnx and without: each goes on where the other was.
    device = ".venv/bin/edge-client run --data notes/ --onnx base-tiny-onnx"
    story.start(device, "uploading")()
    device = ".venv/bin/edge-client run --data notes/ --broker mqtt://broker.example:1883"
    story.start(device, "uploading")()
    serving()
    broker()
    story.run(".venv/bin/aggregator export adapter --state aggregator-state")


def in_a_fleet(story: Story) -> None:
    """README's real fleet, and what a device's owner does in it."""
    job = story.folder / "job.toml"
    job.write_text(job.read_text().replace("rounds = 20", "rounds = 1"))
    shutil.rmtree(story.folder / ".local")  # another reader: a device knows one aggregator
    story.run(".venv/bin/aggregator init ~/fleet --host fleet.example")
    story.start("mosquitto -c ~/fleet/mosquitto.conf", "onnx/manifest")
    serving = story.start(".venv/bin/aggregator serve job.toml --dir ~/fleet", "serving")
    said = story.run(".venv/bin/aggregator enroll kitchen --dir ~/fleet")
    token = re.search(r"tf1-\S+", said)
    assert token is not None, said
    join = ".venv/bin/edge-client join https://fleet.example:8884 --token tf1-..."
    story.run(join, typed=join.replace("tf1-...", token[0]))
    story.run(".venv/bin/edge-client doctor --data notes/")
    story.start(".venv/bin/edge-client run --data notes/", "finished +device")()
    story.run(".venv/bin/aggregator status --dir ~/fleet")
    story.run(".venv/bin/edge-client status")
    story.run(".venv/bin/edge-client plan --explain --model base-tiny")
    story.run(".venv/bin/edge-client install-service --data notes/")
    story.run(".venv/bin/edge-client install-service --data notes/ --memory-cap 1500")
    story.run(".venv/bin/edge-client chat", stdin="import os\n")
    story.run(".venv/bin/edge-client chat --prompt 'What does this Python code do?'")
    story.run("echo 'import asyncio' | .venv/bin/edge-client chat --adapter none")
    story.run(".venv/bin/edge-client export my-model --format merged")
    story.run(".venv/bin/edge-client export --format onnx-int8")
    story.run(".venv/bin/aggregator revoke kitchen --dir ~/fleet")
    serving()
    story.run("aggregator page-token --dir ~/fleet")
    shown = "aggregator serve job.toml --dir ~/fleet --page 8885 --page-host 0.0.0.0"
    story.start(shown, "serving")()
    job.write_text(job.read_text().replace("rounds = 1\n", "rounds = 20\n"))


def with_a_page(story: Story) -> None:
    """The live page's API, of the job that was served first."""
    serving = story.start("aggregator serve job.toml --page 8885", "serving")
    for command in (
        "curl http://localhost:8885/api/v1/jobs/notes",
        "curl 'http://localhost:8885/api/v1/jobs/notes/devices?state=waiting&limit=20'",
        "curl -OJ http://localhost:8885/api/v1/jobs/notes/versions/1/adapter",
        "curl -X POST -H 'X-Tunefleet: action' http://localhost:8885/api/v1/jobs/notes/pause",
        "curl -X POST -H 'X-Tunefleet: action' --json '{\"quorum\": 3}' "
        "http://localhost:8885/api/v1/jobs/notes/policy",
    ):
        story.run(command, typed=command.replace("curl", "curl --fail", 1))
    serving()


def as_operator(story: Story) -> None:
    """The operator guide, with one device."""
    job = (story.folder / "job.toml").read_text().replace("rounds = 1\n", "rounds = 20\n")
    for name in ("notes", "letters"):
        told = job.replace('job = "notes"', f'job = "{name}"')
        (story.folder / f"{name}.toml").write_text(told)
    guide = (ROOT / "docs/operator.md").read_text()
    settings = next(block for block in TOML.findall(guide) if block.startswith("broker ="))
    (story.folder / "fleet.toml").write_text(settings.replace(', "letters.toml"', ""))
    story.start("mosquitto -c broker.conf", "running")
    story.run("aggregator config check -c fleet.toml")
    story.run("aggregator config show -c fleet.toml")
    serving = story.start("aggregator serve -c fleet.toml", "serving")
    device = ".venv/bin/edge-client run --data notes/ --broker mqtt://broker.example:1883"
    leave = story.start(device, "version 8", typed=f"{device} --name kitchen --state kitchen")
    story.run("aggregator status -c fleet.toml")
    story.run("aggregator devices --job notes -c fleet.toml")
    story.run("aggregator rounds --job notes -c fleet.toml")
    story.run("aggregator device show kitchen --job notes -c fleet.toml")
    story.run("aggregator job pause notes -c fleet.toml")
    story.run("aggregator job resume notes -c fleet.toml")
    story.run("aggregator job set notes --deadline 600 --quorum 3 -c fleet.toml")
    story.run("aggregator job set notes --reset quorum -c fleet.toml")
    story.run("aggregator job roll-back 7 --job notes -c fleet.toml")
    story.run("aggregator job create letters.toml -c fleet.toml")
    leave()
    serving()


def with_traces(story: Story) -> None:
    """What needs no fleet: traces of made-up devices."""
    story.run(".venv/bin/fleet-replay traces")
    command = (
        ".venv/bin/fleet-replay traces --scenario flaky-3g --devices 100 --seed 1 --out runs/flaky"
    )
    story.run(command)


def main() -> None:
    """Go through all of it."""
    story = Story(Path(sys.argv[1]))
    settle(story.folder)
    try:
        on_a_broker(story)
        in_a_fleet(story)
        story.end()
        with_a_page(story)
        as_operator(story)
        with_traces(story)
    finally:
        story.end()


if __name__ == "__main__":
    main()
