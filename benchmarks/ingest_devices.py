"""Many devices in one process that only upload: the far side of `benchmarks.ingest`.

Real outboxes, the agent's own sender, TLS with a certificate each; what they send is random, for
nobody learns from it. Says `ready` when all are connected, starts on a line from stdin, says which
devices have heard `done`, and stays connected until stdin ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from edge_client.membership import read_membership, tls_files
from edge_client.outbox import Outbox
from edge_client.sender import Sender
from protocol import topics
from protocol.adapter import Adapter, Factors
from protocol.bands import to_tensors
from protocol.events import EventLog
from protocol.messages import BaseModelInfo, Control, Status, UploadManifest, describe_file
from protocol.messages import upload_id as make_upload_id
from protocol.signing import SigningKey, open_message
from protocol.tensors import encode
from protocol.transport import BrokerAddress, MqttTransport

TICK_S = 0.5
ROUND = 1
CONNECTING = 4
"""Handshakes at once: each takes the broker, one thread, some milliseconds."""


class Device:
    """One device that has joined a fleet."""

    def __init__(self, state: Path, job: str) -> None:
        membership = read_membership(state)
        assert membership is not None, f"{state} has joined no fleet"
        self.name, self._job = membership.device, job
        self._key = SigningKey.load(state / "device.key")
        self._state = state
        address = BrokerAddress.parse(membership.broker)
        self._link = MqttTransport(address, f"tunefleet-{self.name}", tls=tls_files(state))

    def connect(self) -> None:
        """Connect, and say that it is there."""
        self._link.connect(60)
        self._link.subscribe([topics.subscription("control", job=self._job, device=self.name)])
        topic = topics.topic("status", job=self._job, device=self.name)
        status = Status(job=self._job, device=self.name, online=True, boot=1)
        self._link.announce(topic, self._key.seal(status, topic))

    def make_update(self, base: BaseModelInfo, rank: int, seed: int) -> None:
        """Put a random update of a rank into the outbox."""
        data = encode(to_tensors(random_adapter(base, rank, seed)), "bf16")
        manifest = UploadManifest(
            job=self._job,
            device=self.name,
            upload=make_upload_id(self.name, self._job, ROUND),
            round=ROUND,
            version=1,
            rank=rank,
            rank_trained=rank,
            held=rank,
            encoding="bf16",
            file=describe_file(data),
            examples=1000,
        )
        outbox = Outbox(self._state)
        outbox.put(manifest, data, rank=rank)
        outbox.close()  # SQLite is opened anew by the thread that uploads

    def upload(self) -> str:
        """Send the update until the aggregator has said `done`; return the device's name."""
        outbox, events = Outbox(self._state), EventLog(as_json=True, stream=sys.stderr)
        sender = Sender(self._link, self._key, outbox, events)
        while outbox.pending():
            sender.offer(outbox.pending()[0])
            incoming = self._link.receive(TICK_S)
            if incoming is None:
                continue
            self._link.ack(incoming)
            said, _ = open_message(incoming.payload, incoming.topic, Control)
            sender.take(said)
            if said.kind == "reject":
                raise RuntimeError(f"{self.name}'s update was refused: {said.reason}")
        return self.name

    def close(self) -> None:
        """Leave the broker."""
        self._link.close()


def random_adapter(base: BaseModelInfo, rank: int, seed: int) -> Adapter:
    """Return an adapter of small random numbers."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return 1e-3 * draw.standard_normal(shape, np.float32)

    layers = {
        name: Factors(normal(rank, d_in), normal(d_out, rank))
        for name, (d_out, d_in) in base.modules.items()
    }
    return Adapter(layers, 2.0)


def main() -> None:
    """Run the devices whose states are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--model", type=Path, required=True, help="a description in JSON")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--uploading", type=int, required=True, help="how many of them upload")
    parser.add_argument("states", type=Path, nargs="+")
    options = parser.parse_args()
    base = BaseModelInfo.model_validate_json(options.model.read_bytes())
    devices = [Device(state, options.job) for state in options.states]
    active = devices[: options.uploading]
    for seed, device in enumerate(active):
        device.make_update(base, options.rank, seed)
    with ThreadPoolExecutor(CONNECTING) as pool:
        list(pool.map(Device.connect, devices))
    print("ready", flush=True)
    sys.stdin.readline()
    said = threading.Lock()

    def run(device: Device) -> None:
        done = device.upload()
        with said:
            print(json.dumps({"done": done}), flush=True)

    threads = [threading.Thread(target=run, args=(device,), daemon=True) for device in active]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    for device in devices:
        device.close()


if __name__ == "__main__":
    main()
