"""What can't be in an upload's manifest, where it speaks of personal adapters."""

from __future__ import annotations

from protocol.messages import LARGEST_LOSS, GlobalManifest, Job, Probe, UploadManifest
from protocol.tensors import HEADER_LIMIT_BYTES


def wrong_personal(manifest: UploadManifest, round_starts: GlobalManifest, job: Job) -> str:
    """Say what is wrong with an upload of the round that starts from a version; empty if nothing.

    Whether what is said is *true* only the device knows.
    """
    return (
        _wrong_base(manifest, round_starts)
        or _wrong_losses(manifest, round_starts)
        or _wrong_probe(manifest, job.probe)
    )


def probe_limit(probe: Probe | None) -> int:
    """Return the bytes that a device's answer to the probe can have."""
    if probe is None:
        return 0
    return probe.positions * probe.top_k * 6 + HEADER_LIMIT_BYTES  # U32 and F16


def _wrong_base(manifest: UploadManifest, round_starts: GlobalManifest) -> str:
    wanted = round_starts.personal.get(manifest.device)
    if manifest.personal == wanted:
        return ""
    return f"it starts from {_adapter(manifest.personal)}, the round from {_adapter(wanted)}"


def _adapter(own: int | None) -> str:
    return "the common adapter" if own is None else f"version {own} of its own adapter"


def _wrong_losses(manifest: UploadManifest, round_starts: GlobalManifest) -> str:
    said = manifest.trust
    if said is None:
        return ""
    losses = [said.received, said.own, said.trial, *said.candidates.values()]
    for loss in losses:
        if loss is not None and not 0 <= loss <= LARGEST_LOSS:
            return f"a loss of {loss:.3g} on its trust split is not from 0 to {LARGEST_LOSS:.0g}"
    if said.trial is not None and manifest.device not in round_starts.trials:
        return f"it tells the loss of a trial, and was given none with version {manifest.version}"
    strange = [n for n in said.candidates if n >= round_starts.candidates]
    if strange:
        return (
            f"it tells the loss of candidate {min(strange)}; version {manifest.version} has "
            f"{round_starts.candidates}, numbered from 0"
        )
    return ""


def _wrong_probe(manifest: UploadManifest, probe: Probe | None) -> str:
    if manifest.probe_bytes and probe is None:
        return "it answers a probe, and the job has none"
    if manifest.probe_bytes > probe_limit(probe):
        return (
            f"{manifest.probe_bytes} bytes are more than an answer to the probe takes "
            f"({probe_limit(probe)})"
        )
    return ""
