"""What the versions of a replay are worth, measured alike once it is over.

A device measures only the versions that it begins to train from: who is slow or away measures few.
So two policies can't be compared by what devices say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from aggregator.store import Store
from aggregator.versions import Versions
from device_profiles.errors import ReplayError
from device_profiles.virtual.benches import Piece, Seat, Workplace
from device_profiles.virtual.pool import plain_plan
from device_profiles.virtual.text import CarriedText
from edge_client.errors import EdgeError
from protocol.messages import Job

BASE = 0
"""Stands for the base model alone, where versions are numbered."""
Losses = dict[int | None, dict[str, float]]
"""Version → device → held-out loss on its text, nats a token."""


def version_losses(
    place: Workplace,
    job: Job,
    model: str,
    texts: Mapping[str, Path],
    seed: int,
    state: Path,
    versions: Sequence[int],
) -> Losses:
    """Measure the base and each version that is kept on the text of each device.

    In float32, with the whole adapter, whatever a device's plan may be. Devices of one text have
    one loss, measured once.

    Args:
        model: Name of the base; see `find_model`.
        texts: Device → its text.
        seed: Splits the text, as it did for the devices.
        state: The aggregator's folder.

    Raises:
        ReplayError: they can't be measured.
        EngineError: the engine can't do it.
    """
    store = Store(state)
    try:
        kept = [version for version in versions if store.version(version) is not None]
        read = Versions(job, store)
        losses: Losses = {version: {} for version in (BASE, *kept)}
        plan = plain_plan(job, job.rank)
        each = [(text, version) for text in dict.fromkeys(texts.values()) for version in losses]
        answers = place.map(
            Piece(
                Seat(job, str(text), model, CarriedText(text), seed, plan),
                "evaluate",
                {"adapter": read.load(version) if version else None},
            )
            for text, version in each
        )
        for (text, version), answer in zip(each, answers, strict=True):
            losses[version] |= {name: answer.value for name in texts if texts[name] == text}
    except EdgeError as error:
        raise ReplayError(f"the versions could not be measured: {error}") from None
    finally:
        store.close()
    return losses
