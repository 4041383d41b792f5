"""A round of personal adapters around its pure half: what is read for it, written and committed."""

from __future__ import annotations

import numpy as np

from aggregator.issued import TrustMatrix
from aggregator.memory import read_memory
from aggregator.merge import RoundView, Update
from aggregator.merge.round_view import completed
from aggregator.merge.sums import Float64Array
from aggregator.outcome import Outcome, Told
from aggregator.personal.answers import Answer
from aggregator.personal.mixing import PersonalRound, personal_round
from aggregator.personal.settings import Strategy, read_trust_settings
from aggregator.personal.state import TrustState
from aggregator.places import Place
from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.updates import read_probe, read_update
from aggregator.versions import Versions
from protocol.adapter import Adapter
from protocol.faults import fault_point
from protocol.messages import DEVICES, GlobalManifest, Job, TrustLosses
from protocol.probe import TopLogits

DIGITS = 6
"""Decimals of a weight or a score that are kept and told."""


def merge_personal(
    job: Job, strategy: Strategy, store: Store, versions: Versions, state: RoundState
) -> Outcome:
    """Merge the counted updates of a round for each device, by how far it trusts the others.

    Raises:
        MergeError: the round cannot be merged.
    """
    updates: list[Update] = []
    answers: dict[str, Answer] = {}
    probes: dict[str, TopLogits] = {}
    for manifest in store.uploads.of_round(state.number, "counted"):
        data = store.uploads.file(manifest).read_bytes()
        update = read_update(job, versions, manifest, data)
        updates.append(completed(update, versions.base(manifest)))
        if manifest.trust is not None:
            offered = store.issued.candidates(manifest.version)
            late = manifest.version != state.version
            answers[manifest.device] = _answer(manifest.trust, offered, late=late)
        probe = read_probe(job, manifest, data)
        if probe is not None:
            probes[manifest.device] = probe
    view = RoundView(
        versions.load(state.version),
        updates,
        job.base.modules,
        job.rank,
        seed=job.seed + state.number,
        memory=read_memory(store),
    )
    before = store.issued.trust_state()
    mixed = personal_round(
        strategy,
        view,
        answers,
        probes,
        TrustState.model_validate_json(before) if before else TrustState(),
        read_trust_settings(job.rule_settings),
        version=state.version + 1,
        last=state.number >= job.rounds,
    )
    return PersonalOutcome(mixed, store, versions, state)


def _answer(losses: TrustLosses, offered: dict[int, str], *, late: bool) -> Answer:
    """Return what a device has told, by the names of those whose adapters were `offered` to it.

    The trial of a late answer was beside another temperature than the device has now.
    """
    tried = {offered[n]: loss for n, loss in losses.candidates.items() if n in offered}
    return Answer(losses.received, losses.own, None if late else losses.trial, tried)


class PersonalOutcome(Outcome):
    """Hold a round that has adapters beside the common one."""

    def __init__(
        self, mixed: PersonalRound, store: Store, versions: Versions, state: RoundState
    ) -> None:
        super().__init__(mixed.common)
        self._round = mixed
        self._store = store
        self._versions = versions
        self._state = state
        self._written: list[tuple[Place, str, GlobalManifest]] = []
        """Place, whose adapter it is, and its manifest."""

    def write(self, manifest: GlobalManifest) -> GlobalManifest:
        mixed, version = self._round, manifest.version
        personal = self._personal(version)
        new = [device for device, own in personal.items() if own == version]
        trials = [device for device in new if device in mixed.trials]
        for device in new:
            self._write(Place("personal", version, device), device, mixed.mixtures[device])
        for device in trials:
            self._write(Place("trial", version, device), device, mixed.trials[device])
        for number, (device, adapter) in enumerate(mixed.candidates.items()):
            self._write(Place("candidate", version, str(number)), device, adapter)
        fault_point("aggregator.personal.written")
        return manifest.model_copy(
            update={
                "personal": personal,
                "trials": trials,
                "candidates": len(mixed.candidates),
            }
        )

    def commit(self) -> None:
        for place, device, manifest in self._written:
            self._store.issued.add(place, device, manifest)
        self._store.issued.set_trust_state(self._round.state.model_dump_json())
        self._store.issued.add_trust(self._state.number, self._matrix())

    def told(self) -> Told:
        matrix = self._matrix()
        told = ("devices", "weights", "temperatures")
        return {"trust": {name: getattr(matrix, name) for name in told}}

    def _write(self, place: Place, device: str, adapter: Adapter) -> None:
        manifest = self._versions.write_at(place, adapter, self._state.version)
        self._written.append((place, device, manifest))

    def _personal(self, version: int) -> dict[str, int]:
        """Return who goes on with an adapter of its own: who took no part keeps the one it has.

        Where there are too many for a manifest, those who have been away longest go on with the
        common one.
        """
        before = self._store.version(self._state.version)
        entries = dict(before.personal) if before is not None else {}
        took_part, mixed = self._round.devices, self._round.mixtures
        entries = {device: own for device, own in entries.items() if device not in took_part}
        entries |= dict.fromkeys(mixed, version)
        newest = sorted(entries, key=lambda device: (-entries[device], device))[:DEVICES]
        return {device: entries[device] for device in sorted(newest)}

    def _matrix(self) -> TrustMatrix:
        mixed = self._round
        return TrustMatrix(
            list(mixed.devices), _rounded(mixed.rows), mixed.temperatures, _known(mixed.scores)
        )


def _rounded(matrix: Float64Array) -> list[list[float]]:
    return [[round(float(number), DIGITS) for number in row] for row in matrix]


def _known(matrix: Float64Array) -> list[list[float | None]]:
    """Return a matrix with None where a number is not finite."""
    return [[number if np.isfinite(number) else None for number in row] for row in _rounded(matrix)]
