"""From what a round taught a device to what it sends: the change, and the manifest about it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edge_client.errors import TrainingDiverged
from edge_client.learning import Learned
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from protocol.bands import to_tensors
from protocol.factors import trained_factors
from protocol.faults import fault_point
from protocol.messages import Job, Round, UploadManifest, describe_file, upload_id
from protocol.metrics import LOSS_AFTER, LOSS_BEFORE, TOKEN_BUCKETS, asked_for
from protocol.tensors import encode


def make_update(
    job: Job, now: Round, device: str, learned: Learned, text: TextReport, *, held_out_loss: float
) -> tuple[UploadManifest, bytes]:
    """Return a device's upload for a round; `held_out_loss` is that of the adapter it received.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    losses = (learned.report.loss, *(learned.report.sample_losses or ()))
    if not math.isfinite(sum(losses)):
        raise TrainingDiverged(
            f"training diverged in round {now.number}: its loss is {losses[-1]}; the "
            f"job's learning_rate ({job.training.learning_rate:g}) is too high for this device's "
            "text"
        )
    fault_point("device.update.made")
    trained = trained_factors(job.training.factors, now.number)
    data = encode(to_tensors(learned.change, trained), job.encoding_up)
    manifest = UploadManifest(
        job=job.job,
        device=device,
        upload=upload_id(device, job.job, now.number, now.attempt),
        round=now.number,
        attempt=now.attempt,
        version=now.version,
        rank=learned.rank,
        rank_trained=learned.rank_trained,
        held=learned.held,
        modules=learned.modules,
        encoding=job.encoding_up,
        file=describe_file(data),
        examples=learned.report.tokens,
        metrics={
            "held_out_loss": held_out_loss,
            "train_loss": learned.report.loss,
            **asked_metrics(job, learned.report, text.histogram),
        },
    )
    return manifest, data


def asked_metrics(job: Job, report: TrainReport, histogram: Sequence[int]) -> dict[str, float]:
    """Return what the job wants to be told besides, and nothing that it does not want."""
    known = dict(zip((LOSS_BEFORE, LOSS_AFTER), report.sample_losses or (), strict=False))
    total = max(sum(histogram), 1)
    known |= {
        name: round(count / total, 4) for name, count in zip(TOKEN_BUCKETS, histogram, strict=False)
    }
    return {name: known[name] for name in asked_for(job.rule_settings) if name in known}
