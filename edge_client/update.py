"""From what a round taught a device to what it sends: the change, and the manifest about it."""

from __future__ import annotations

import math

from edge_client.errors import TrainingDiverged
from edge_client.learner import Learned
from protocol.bands import to_tensors
from protocol.factors import trained_factors
from protocol.faults import fault_point
from protocol.messages import Job, Round, UploadManifest, describe_file, upload_id
from protocol.tensors import encode


def make_update(
    job: Job, now: Round, device: str, learned: Learned, *, held_out_loss: float
) -> tuple[UploadManifest, bytes]:
    """Return a device's upload for a round; `held_out_loss` is that of the adapter it received.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    if not math.isfinite(learned.report.loss):
        raise TrainingDiverged(
            f"training diverged in round {now.number}: its loss is {learned.report.loss}; the "
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
        metrics={"held_out_loss": held_out_loss, "train_loss": learned.report.loss},
    )
    return manifest, data
