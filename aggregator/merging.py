"""What a round merges: its updates, read from their files and put onto today's version.

An update that starts from an older version has directions that are other vectors than today's. In a
synchronous round it is put over the version that it started from, and averaged as a value. In a
buffered one, where most are of that kind, what it moved is added to today's version, discounted.
"""

from __future__ import annotations

from dataclasses import replace

from aggregator.engine import IN_PROCESS, Engine
from aggregator.errors import ConfigError
from aggregator.memory import read_memory
from aggregator.merge import RoundView, Rule, Update, merge
from aggregator.merge.round_view import completed, rebased
from aggregator.merge.rules import find_rule
from aggregator.outcome import Outcome
from aggregator.personal import strategy_of
from aggregator.personal.serving import merge_personal
from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.updates import stored_update
from aggregator.versions import Versions
from protocol.factors import trained_factors
from protocol.messages import Job


def check_engine(job: Job, engine: str) -> None:
    """Refuse an engine that would have nothing to do.

    Raises:
        ConfigError: the job's rule is none that merges module by module.
    """
    if engine != "plain" and not (
        strategy_of(job.rule) is None and isinstance(find_rule(job.rule), Rule)
    ):
        raise ConfigError(
            f"--engine {engine} shares out the modules of the built-in merge rules; rule "
            f"{job.rule!r} merges in this process: leave it out"
        )


def merge_round(
    job: Job,
    store: Store,
    versions: Versions,
    state: RoundState,
    *,
    buffered: bool = False,
    engine: Engine = IN_PROCESS,
) -> Outcome:
    """Merge the counted updates of a round by the job's rule, which reads them module by module.

    Raises:
        MergeError: the round cannot be merged.
        EngineError: the engine that is to merge its modules can't.
    """
    if (strategy := strategy_of(job.rule)) is not None:
        return merge_personal(job, strategy, store, versions, state)
    # Another package's rule knows of no changes that lie beside an adapter.
    rebasing = buffered and isinstance(find_rule(job.rule), Rule)
    settings = {"staleness": True, **job.rule_settings} if rebasing else job.rule_settings
    previous = versions.load(state.version)
    updates: dict[str, Update] = {}
    manifests = store.uploads.of_round(state.number, "counted")
    for manifest in sorted(manifests, key=lambda m: -m.version):  # each version is read once
        update = stored_update(job, versions, manifest, store.uploads.file(manifest))
        if behind := state.number - manifest.round:
            started = versions.load(manifest.version)
            put = rebased(update, started, previous) if rebasing else completed(update, started)
            update = replace(put, staleness=behind)
        updates[manifest.upload] = update
    # A late one has other rows than the previous global of what it left frozen.
    late = any(update.staleness for update in updates.values())
    view = RoundView(
        previous,
        [updates[manifest.upload] for manifest in manifests],
        job.base.modules,
        job.rank,
        seed=job.seed + state.number,
        memory=read_memory(store),
        trained="both" if late else trained_factors(job.training.factors, state.number),
    )
    return Outcome(merge(job.rule, view, settings=settings, engine=engine))
