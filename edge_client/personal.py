"""A device's update, and what that of a job with personal adapters brings besides its change."""

from __future__ import annotations

from edge_client.holding import Holding
from edge_client.learning import Learned, Learning
from edge_client.trying import SPLIT, can_be_told
from edge_client.update import make_update
from protocol.adapter import Adapter, Factors
from protocol.messages import Job, Round, TrustLosses, UploadManifest, describe_file
from protocol.probe import encode_probe


def make_answer(
    now: Round,
    held: Holding,
    learned: Learned,
    learner: Learning,
    *,
    held_out_loss: float,
    trust: TrustLosses | None,
) -> tuple[UploadManifest, bytes, float | None]:
    """Return a device's whole update for a round, and its own loss as `with_answers` does.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    assert held.adapter is not None, "which was trained"
    job = held.job
    update = make_update(job, now, held.device, learned, learner.text, held_out_loss=held_out_loss)
    if not job.is_personal and job.probe is None:
        return *update, None
    full = full_adapter(held.adapter, learned)
    return with_answers(update, learner, job, full, personal=held.personal, trust=trust)


def full_adapter(held: Adapter, learned: Learned) -> Adapter:
    """Return what a device has after training: its change laid over all the directions it held."""
    layers = {}
    for name, whole in held.truncated(learned.held).layers.items():
        change, at = learned.change.layers[name], learned.directions[name]
        a, b = whole.a.copy(), whole.b.copy()  # (held, d_in), (d_out, held)
        a[at] += change.a
        b[:, at] += change.b
        layers[name] = Factors(a, b)
    return Adapter(layers, held.scale)


def with_answers(
    update: tuple[UploadManifest, bytes],
    learner: Learning,
    job: Job,
    full: Adapter,
    *,
    personal: int | None,
    trust: TrustLosses | None,
) -> tuple[UploadManifest, bytes, float | None]:
    """Return an update with what it answers, and the loss of the full adapter on the trust split.

    The answer to the job's probe, if it has one, follows the change in the same file. `personal` is
    the version of the own adapter that the device started from. The loss is None if it is no
    number that can be told.
    """
    manifest, data = update
    probe = encode_probe(learner.predict(full, job.probe)) if job.probe is not None else b""
    data += probe
    told = {"personal": personal, "trust": trust, "probe_bytes": len(probe)}
    manifest = manifest.model_copy(update={**told, "file": describe_file(data)})
    own = learner.evaluate(full, SPLIT)
    return manifest, data, own if can_be_told(own) else None
