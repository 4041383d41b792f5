"""The fleet of a dataset and a model, with which all that is measured on a folder's text begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import base_tiny
from benchmarks.quality.arms import Schedule
from benchmarks.quality.datasets import PER_DOMAIN, RANKS, read_devices
from benchmarks.simulation import Setting, Simulation

DATASETS = ("multilingual_ud", "dialogue_sgd", "shakespeare_roles")
BUNDLED = "base-tiny"
ROWS = {"trust": 8, "held_out": 40}
"""Rows of 128 tokens on which each device's losses are measured."""


def open_fleet(
    data: Path,
    dataset: str,
    model: str,
    schedule: Schedule,
    *,
    seed: int,
    ranks: Sequence[int] = RANKS,
    per_domain: int = PER_DOMAIN,
) -> Simulation:
    """Return devices of `ranks` with a folder's text, on a model of the folder or on base-tiny.

    Raises:
        DataError, ModelError: what the folder has of it is missing or can't be used.
    """
    folder = base_tiny.PATH if model == BUNDLED else data / "models" / model
    setting = Setting(schedule.max_tokens, schedule.tokens_per_step // schedule.max_tokens, ROWS)
    devices = read_devices(data, dataset, seed=seed, ranks=ranks, per_domain=per_domain)
    return Simulation(folder, devices, seed=seed, setting=setting)
