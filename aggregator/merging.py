"""What a round merges: its updates, read from their files and put onto today's version; and how
that is committed.

An update that starts from an older version has directions that are other vectors than today's. In a
synchronous round it is put over the version that it started from, and averaged as a value. In a
buffered one, where most are of that kind, what it moved is added to today's version, discounted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from aggregator.engine import IN_PROCESS, Engine
from aggregator.errors import ConfigError
from aggregator.memory import read_memory, write_memory
from aggregator.merge import RoundView, Rule, Update, merge
from aggregator.merge.round_view import completed, rebased
from aggregator.merge.rules import find_rule
from aggregator.outcome import Outcome
from aggregator.personal import strategy_of
from aggregator.personal.serving import merge_personal
from aggregator.rounds import Policy, RoundState
from aggregator.store import Store
from aggregator.updates import stored_update
from aggregator.versions import Versions
from protocol.factors import trained_factors
from protocol.faults import fault_point
from protocol.messages import GlobalManifest, Job


def merges_by_module(job: Job) -> bool:
    """Say whether a job's rule merges module by module, which an engine can share out."""
    return strategy_of(job.rule) is None and isinstance(find_rule(job.rule), Rule)


def check_engine(job: Job, engine: str) -> None:
    """Refuse an engine that would have nothing to do.

    Raises:
        ConfigError: the job's rule is none that merges module by module.
    """
    if engine != "plain" and not merges_by_module(job):
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


@dataclass(frozen=True, slots=True)
class Committed:
    """What came of a round that was merged."""

    outcome: Outcome
    manifest: GlobalManifest
    """Of the version that it made."""
    after: RoundState
    seconds: float
    """That merging took, without writing."""


def commit_round(
    job: Job,
    store: Store,
    versions: Versions,
    state: RoundState,
    policy: Policy,
    *,
    deadline: Callable[[], float],
    engine: Engine = IN_PROCESS,
) -> Committed:
    """Merge a round, write its version and commit it with the state after it, all in one turn.

    `deadline` says when a round that begins now ends, in seconds since 1970.

    Raises:
        MergeError, EngineError: as `merge_round`.
        StoreError: the disk is full, or not in order.
    """
    with store.turn():
        store.uploads.finish_keeping()  # another process may have been killed before it could
        started = time.monotonic()
        outcome = merge_round(
            job, store, versions, state, buffered=policy.buffer > 0, engine=engine
        )
        merged, seconds = outcome.merged, time.monotonic() - started
        fault_point("aggregator.merge.after")
        manifest = versions.write(merged.adapter, version=state.version + 1, parent=state.version)
        manifest = outcome.write(manifest)
        fault_point("aggregator.version.written")
        carried = write_memory(store, merged.memory, version=manifest.version)
        fault_point("aggregator.memory.written")
        if state.number >= job.rounds:
            after = replace(state, state="finished", version=manifest.version, deadline=None)
        else:
            after = RoundState(state.number + 1, "open", manifest.version, deadline())
        store.finish_round(
            after,
            manifest,
            number=state.number,
            seconds=seconds,
            weights=merged.weights,
            residual=merged.residual,
            carried=carried,
            late_updates=policy.behind,
            beside=outcome.commit,
        )
    return Committed(outcome, manifest, after, seconds)
