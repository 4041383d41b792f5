"""A light device of a job with personal adapters: it collects all that the broker has for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.places import Place, common
from edge_client.trust import open_trusted
from protocol import topics
from protocol.adapter import Adapter
from protocol.bands import Band, band_ranks, bands, join, read_adapter
from protocol.chunks import check_file
from protocol.messages import GlobalManifest, Job, Round, TrustLosses
from protocol.probe import TopLogits, encode_probe
from protocol.transport import BrokerAddress, Incoming
from tests.aggregator.light_device import Learn, LightDevice

Losses = Callable[[str, Round], float | None]
"""What is tried (`received`, `own`, `trial`, a candidate's number), round → loss, None: unknown."""
MINE = ("personal", "trial")


class PersonalDevice(LightDevice):
    """Take part in a job, tell losses and answer the probe as it is told to.

    `tokens` are the token ids that it predicts on the probe; None: it does not answer.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        folder: Path,
        name: str,
        job: Job,
        learn: Learn,
        losses: Losses = lambda *_: None,
        tokens: range | None = None,
    ) -> None:
        self.losses, self.tokens = losses, tokens
        self.kept: dict[str, Incoming] = {}
        """What the broker keeps for the device: topic → message."""
        super().__init__(broker, folder, name, job, learn)
        kinds = [f"{k}_{part}" for k in ("global", "candidate") for part in ("manifest", "chunk")]
        self.link.subscribe([topics.subscription(kind, job=job.job) for kind in kinds])
        kinds = [f"{k}_{part}" for k in MINE for part in ("manifest", "chunk")]
        self.link.subscribe([topics.subscription(k, job=job.job, device=name) for k in kinds])

    def manifest(self, place: Place) -> GlobalManifest | None:
        found = self.kept.get(place.manifest_topic(self.job.job))
        return found and open_trusted(found, GlobalManifest, self.folder)

    def adapter(self, place: Place) -> Adapter:
        """Return an adapter as it is on the broker."""
        manifest = self.manifest(place)
        assert manifest is not None, f"{self.name} has no {place}"
        parts: dict[Band, Adapter] = {}
        for band in bands(self.job.ladder):
            info = manifest.bands[band.name]
            names = [
                place.chunk_topic(self.job.job, band.name, index)
                for index in range(len(info.chunks))
            ]
            data = b"".join(self.kept[name].payload for name in names)
            check_file(data, info.bytes, info.sha256)
            shapes = self.job.base.modules
            ranks = band_ranks(shapes, band)
            parts[band] = read_adapter(data, shapes, ranks, self.job.scale, manifest.encoding)
        return join(parts, self.job.scale)

    def places(self) -> set[Place]:
        """Return all of which the broker keeps a manifest for this device."""
        found = set()
        for name in self.kept:
            kind, fields = topics.match(name)
            if kind.endswith("_manifest"):
                who = fields.get("device") or fields.get("number") or ""
                found.add(Place(kind.removesuffix("_manifest"), int(fields["version"]), who))
        return found

    def _take(self, incoming: Incoming) -> None:
        if not incoming.payload:
            self.kept.pop(incoming.topic, None)
        elif topics.match(incoming.topic).kind in ("round", "control"):
            super()._take(incoming)
        else:
            self.kept[incoming.topic] = incoming

    def _train(self, now: Round) -> None:
        if self.manifest(common(now.version)) is not None:
            super()._train(now)

    def said(self, now: Round) -> tuple[dict[str, Any], bytes]:
        start = self.manifest(common(now.version))
        assert start is not None
        told: dict[str, Any] = {"personal": start.personal.get(self.name)}
        received = self.losses("received", now)
        if received is not None:
            tried = {n: self.losses(str(n), now) for n in range(start.candidates)}
            told["trust"] = TrustLosses(
                received=received,
                own=self.losses("own", now),
                trial=self.losses("trial", now) if self.name in start.trials else None,
                candidates={n: loss for n, loss in tried.items() if loss is not None},
            )
        if self.tokens is None:
            return told, b""
        assert self.job.probe is not None
        shape = (self.job.probe.positions, self.job.probe.top_k)
        indices = np.tile(np.array(self.tokens)[: shape[1]], (shape[0], 1))
        behind = encode_probe(TopLogits(indices, np.full(shape, 5.0)))
        return {**told, "probe_bytes": len(behind)}, behind
