"""What a finished job leaves on a device: its adapters, and what they are worth on its text."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_client.learner import Learning, OnStep
from edge_client.storage import keep_adapter
from protocol.adapter import Adapter
from protocol.messages import Job


def keep_result(
    state: Path, job: Job, learner: Learning, adapter: Adapter, common: Adapter | None
) -> dict[str, float]:
    """Keep the adapter that a device ends with, and the common one if its own is another.

    Returns:
        Held-out losses in nats a token: `merged_on_device` of the first, `common` of the second.

    Raises:
        StorageError: they can't be written.
    """
    keep_adapter(adapter, state / "adapter", job.base.name)
    loss = {"merged_on_device": learner.evaluate(adapter)}
    if common is None:
        shutil.rmtree(state / "common", ignore_errors=True)  # an earlier job's
    else:
        keep_adapter(common, state / "common", job.base.name)
        loss["common"] = learner.evaluate(common)
    return loss


def train_alone(state: Path, job: Job, learner: Learning, rank: int, on_step: OnStep) -> float:
    """Train what the whole job trains with no exchange, keep it, and return its held-out loss.

    Raises:
        StorageError: it can't be written.
    """
    adapter, _ = learner.train_alone(rank=rank, on_step=on_step)
    keep_adapter(adapter, state / "alone", job.base.name)
    return learner.evaluate(adapter)
