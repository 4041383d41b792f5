"""What a round merges: its updates, read from their files."""

from __future__ import annotations

from dataclasses import replace

from aggregator.memory import read_memory
from aggregator.merge import RoundView, merge
from aggregator.merge.round_view import completed
from aggregator.outcome import Outcome
from aggregator.personal import strategy_of
from aggregator.personal.serving import merge_personal
from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.updates import stored_update
from aggregator.versions import Versions
from protocol.factors import trained_factors
from protocol.messages import Job


def merge_round(job: Job, store: Store, versions: Versions, state: RoundState) -> Outcome:
    """Merge the counted updates of a round by the job's rule, which reads them module by module."""
    if (strategy := strategy_of(job.rule)) is not None:
        return merge_personal(job, strategy, store, versions, state)
    updates = []
    trained = trained_factors(job.training.factors, state.number)
    for manifest in store.uploads.of_round(state.number, "counted"):
        update = stored_update(job, versions, manifest, store.uploads.file(manifest))
        if behind := state.number - manifest.round:
            update = completed(update, versions.load(manifest.version))
            update = replace(update, staleness=behind)
            trained = "both"  # it has other rows than the previous global of what it left frozen
        updates.append(update)
    view = RoundView(
        versions.load(state.version),
        updates,
        job.base.modules,
        job.rank,
        seed=job.seed + state.number,
        memory=read_memory(store),
        trained=trained,
    )
    return Outcome(merge(job.rule, view, settings=job.rule_settings))
