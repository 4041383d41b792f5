"""What a finished job leaves on a device: its adapters, and what they are worth on its text."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from edge_client.errors import TrainingDiverged
from edge_client.holding import Holding
from edge_client.learning import Learning
from edge_client.own_changes import OwnChanges, best_share
from edge_client.private import Private
from edge_client.storage import keep_adapter
from edge_client.trying import SPLIT
from protocol.adapter import Adapter
from protocol.events import EventLog
from protocol.messages import Job


def conclude(
    state: Path,
    learner: Learning,
    held: Holding,
    events: EventLog,
    *,
    base_loss: float,
    alone_rank: int | None,
    private: Private | None,
) -> dict[str, object]:
    """Keep all that a device ends a job with, and return what is told of it.

    With `alone_rank` it also trains as much by itself, to compare.

    Raises:
        StorageError: something can't be written, or what was kept can't be read.
    """
    own = held.personal
    share = settle(learner, held, OwnChanges(held.job, state))
    assert held.adapter is not None, "its version is there"
    loss = {"base": base_loss, **keep_result(state, held.job, learner, held.adapter, held.common)}
    if alone_rank is not None:
        loss["local"] = train_alone(state, held.job, learner, alone_rank, events)
    told: dict[str, object] = {
        "adapter": str(state / "adapter"),
        "kept": str(held.source),
        "personal": own,
        "own_share": share,
        "loss": loss,
    }
    if private is not None:
        told["private"] = private.mix(learner, held.adapter).as_dict()
    return told


def settle(learner: Learning, held: Holding, own: OwnChanges) -> float:
    """Let a device of a job with personal adapters end with what does best on its trust split.

    That is its own, the same at a sharper temperature, or the common one; and then with so much
    more of its own changes as helps, which is returned.

    Raises:
        StorageError: what was kept of its own changes can't be read.
    """
    if not held.job.is_personal or held.adapter is None or held.heading is None:
        return 0.0
    if held.common is not None:
        best = learner.evaluate(held.adapter, SPLIT)
        if held.sharper is not None and (loss := learner.evaluate(held.sharper, SPLIT)) < best:
            held.adapter, best = held.sharper, loss
        if learner.evaluate(held.common, SPLIT) < best:
            held.adapter, held.source = held.common, held.common_of(held.heading.version)
    total = own.total()
    if total is None:
        return 0.0
    chosen, share = best_share(
        lambda adapter: learner.evaluate(adapter, SPLIT), held.adapter, total, held.job
    )
    if share:
        held.adapter, held.common = chosen, held.common or held.adapter
    return share


def keep_result(
    state: Path, job: Job, learner: Learning, adapter: Adapter, common: Adapter | None
) -> dict[str, float]:
    """Keep the adapter that a device ends with, and the common one if its own is another.

    Returns:
        Held-out losses in nats a token: `merged_on_device` of the first, `common` of the second.

    Raises:
        StorageError: they can't be written.
    """
    keep_adapter(adapter, state / "adapter", job.base)
    for name in ("private", "mixed"):  # an earlier job's: this one's come after
        shutil.rmtree(state / name, ignore_errors=True)
    loss = {"merged_on_device": learner.evaluate(adapter)}
    if common is None:
        shutil.rmtree(state / "common", ignore_errors=True)  # an earlier job's
    else:
        keep_adapter(common, state / "common", job.base)
        loss["common"] = learner.evaluate(common)
    return loss


def train_alone(state: Path, job: Job, learner: Learning, rank: int, events: EventLog) -> float:
    """Train what the whole job trains with no exchange, keep it, and return its held-out loss.

    Where that diverges there is nothing to keep, and the loss is NaN: the job's result stands.

    Raises:
        StorageError: it can't be written.
    """
    steps = job.training.steps * job.rounds
    events.emit("state", state="training alone, to compare")

    def on_step(step: int, loss: float) -> None:
        events.emit("alone", step=step, steps=steps, loss=round(loss, 4))

    try:
        adapter, _ = learner.train_alone(rank=rank, on_step=on_step)
    except TrainingDiverged as error:
        events.emit("alone-diverged", detail=str(error))
        shutil.rmtree(state / "alone", ignore_errors=True)  # an earlier job's
        return math.nan
    keep_adapter(adapter, state / "alone", job.base)
    return learner.evaluate(adapter)
