"""A job's state as a fleet of any size would have left it, made up in a moment."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from pathlib import Path

from aggregator.issued import TrustMatrix
from aggregator.rounds import Policy, RoundState
from aggregator.store import Store
from aggregator.versions import Versions, first_version
from protocol.messages import BaseModelInfo, Job, Status, Training

JOB = "notes"
LADDER = [2, 4, 8, 16]
PROFILES = ("Raspberry Pi 4B, 4 GB", "Raspberry Pi 5, 8 GB", "Jetson Nano, 4 GB", "laptop, 16 GB")
HOW = (
    ("training", "", 30), ("idle", "", 40), ("uploading", "", 3), ("downloading", "", 2),
    ("waiting", "on battery", 9), ("waiting", "outside the hours 22:00 to 06:00", 6),
    ("waiting", "a metered link", 3), ("unfit", "the base needs 900 MiB, there are 512", 2),
    ("planning", "", 2), ("stopped", "", 1),
)  # fmt: skip
"""State, detail, weight."""
OFFLINE = 0.08


def made_job(rule: str = "anchored", rounds: int = 200, name: str = JOB) -> Job:
    """Return a job with a tiny base."""
    modules = {f"layer.{n}.{part}": (64, 64) for n in range(4) for part in ("q", "v")}
    base = BaseModelInfo(name="base-tiny", sha256="0" * 64, parameters=1_000_000, modules=modules)
    return Job(
        job=name, base=base, scale=2.0, ladder=LADDER, rule=rule, rounds=rounds,
        training=Training(steps=50),
    )  # fmt: skip


def made_fleet(
    folder: Path, devices: int, rounds: int, *, trust: bool = False, seed: int = 1, name: str = JOB
) -> None:
    """Make a state folder in which so many rounds of a job have ended, and one is open."""
    draw = random.Random(seed)
    job = made_job("trust-predictions" if trust else "anchored", name=name)
    store = Store(folder)
    with store.transaction():
        store.bind_job(job)
        store.set_policy(Policy(quorum=max(1, devices // 2), deadline_s=3600))
        versions = Versions(job, store)
        for number in range(max(1, rounds - 8), rounds + 2):
            manifest = versions.write(first_version(job), version=number, parent=number - 1 or None)
            store.add_version(manifest)
        now = time.time()
        is_open = RoundState(rounds + 1, "open", rounds + 1, now + 1900)
        store.set_round(is_open if devices else RoundState(0, "waiting", 1, None))
        for device in names(devices):
            store.devices.set_status(_status(job, device, rounds, draw), "ed25519-key-of-" + device)
        if trust and devices:
            store.issued.add_trust(rounds, _trust(names(devices), draw))
    store.close()
    with sqlite3.connect(folder / "store.sqlite") as db:
        _rounds(db, names(devices), rounds, now, draw)


def names(devices: int) -> list[str]:
    """Return the devices' names, in their order."""
    return [f"device-{n:04d}" for n in range(devices)]


def _status(job: Job, device: str, version: int, draw: random.Random) -> Status:
    state, detail, _ = draw.choices(HOW, [weight for *_, weight in HOW])[0]
    return Status.model_validate(
        {
            "job": job.job, "device": device, "online": draw.random() > OFFLINE, "boot": 1,
            "state": state, "detail": detail, "profile": draw.choice(PROFILES),
            "rank": draw.choice(LADDER), "version": version + 1,
        }
    )  # fmt: skip


def _rounds(
    db: sqlite3.Connection, devices: list[str], rounds: int, now: float, draw: random.Random
) -> None:
    own = {device: draw.gauss(0, 0.12) for device in devices}
    rank = {device: draw.choice(LADDER) for device in devices}
    for number in range(1, rounds + 2):
        at = now - (rounds + 1 - number) * 600
        is_open = number == rounds + 1
        level = 2.1 + 1.4 / (1 + 0.25 * number)
        part = [d for d in devices if draw.random() < (0.35 if is_open else 0.9)]
        db.executemany(
            "INSERT INTO counted VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (number, d, rank[d], 16, rank[d] * 2100, rank[d] * 2048,
                 level + own[d] + draw.gauss(0, 0.02), at + draw.random() * 400, number)
                for d in part
            ],
        )  # fmt: skip
        refused = [d for d in devices if draw.random() < 0.01]
        db.executemany(
            "INSERT INTO refused VALUES (?, ?, 1, ?, ?)",
            [(number, d, "its factors are as large as 3e+05", at) for d in refused],
        )
        ended = None if is_open else at + 500
        db.execute("INSERT OR REPLACE INTO times VALUES (?, ?, ?, '')", [number, at, ended])
        if not is_open:
            seconds = 0.02 + 0.0004 * len(devices) * (1 + draw.random())
            weights = json.dumps({d: 1 / len(part) for d in part})
            db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?)",
                [number, number + 1, seconds, weights, 0.02 + draw.random() * 0.02],
            )


def _trust(devices: list[str], draw: random.Random) -> TrustMatrix:
    def row(i: int) -> list[float]:
        near = [(4.0 if i % 3 == j % 3 else 0.7) * draw.random() + 0.1 for j in range(len(devices))]
        near[i] *= 3
        return [round(value / sum(near), 5) for value in near]

    weights = [row(i) for i in range(len(devices))]
    return TrustMatrix(devices, weights, dict.fromkeys(devices, 0.5), [])
