"""Replays in the test's own process, beside a real broker and a real aggregator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_profiles.virtual.options import Options, prepare
from device_profiles.virtual.run import replay_traces
from protocol.messages import BaseModelInfo
from tests.device_profiles.virtual.made_pool import described_base, made_pool


class Replay:
    """What a replay came to: its result, and its events."""

    def __init__(self, folder: Path, result: dict[str, Any]) -> None:
        self.folder, self.result = folder, result
        lines = (folder / "events.jsonl").read_text().splitlines()
        self.events: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.result["rounds"]
        return found

    def counted(self) -> list[tuple[str, int]]:
        """The device and round of each update, as often as the aggregator has counted it."""
        return [(e["device"], e["round"]) for e in self.of("aggregator.counted")]


Run = Callable[..., Replay]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the description of a base, and a pool of it."""
    folder = tmp_path_factory.mktemp("made")
    base = described_base(folder)
    pool = made_pool(folder / "pool", BaseModelInfo.model_validate_json(base.read_bytes()))
    return base, pool


@pytest.fixture
def replay(tmp_path: Path, made: tuple[Path, Path]) -> Run:
    """Return what replays options, with settings of the job beside the usual ones."""
    runs = 0

    def run(options: Options, **job: Any) -> Replay:
        nonlocal runs
        runs += 1
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        base, pool = made
        given = replace(
            options,
            until_s=36 * 3600,
            pool=str(pool),
            job={"model": str(base), **options.job, **job},
        )
        staging, kept, _ = prepare(given, folder, tmp_path / "cache", lambda what: None)
        return Replay(folder, replay_traces(staging, folder, kept, lambda event: None))

    return run
