"""What Prometheus reads at `/metrics`: a fleet's numbers, from the same snapshots as the page.

Names begin with `tunefleet_`, times are in seconds and sizes in bytes. What a label may be is
bounded: jobs, states, ranks of a job's ladder; never a device. Nothing is counted in memory: totals
are what the store has, and go on over restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from aggregator.view import FleetReader, JobView, StateView, Totals
from aggregator.view.crowd import LETTERS

BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
"""Upper bounds of the buckets of merge times."""
STATES = tuple(word for word in LETTERS if word != "quarantined")
JOB_STATES = ("waiting", "open", "finished")
Row = tuple[Sequence[str], float]
"""Values of the labels behind the job's, and the sample's."""

_GAUGES: dict[str, tuple[str, tuple[str, ...], Callable[[JobView], list[Row]]]] = {
    "devices": (
        "Devices of a job by what they said last.",
        ("state",),
        lambda job: [([word], job.devices.by_state.get(word, 0)) for word in STATES],
    ),
    "devices_ready": (
        "Devices that are online, able to train and not kept out.",
        (),
        lambda job: [([], job.devices.ready)],
    ),
    "devices_quarantined": (
        "Devices that are kept out for what they sent.",
        (),
        lambda job: [([], job.devices.quarantined)],
    ),
    "job_state": (
        "1 for the state that a job is in.",
        ("state",),
        lambda job: [([word], job.state == word) for word in JOB_STATES],
    ),
    "job_paused": ("1 while a job is paused.", (), lambda job: [([], job.paused is not None)]),
    "job_served": (
        "1 while an aggregator serves the job.",
        (),
        lambda job: [([], job.running)],
    ),
    "round_number": ("Number of the newest round.", (), lambda job: [([], job.round)]),
    "round_attempt": (
        "How often the open round was extended for want of updates.",
        (),
        lambda job: [([], job.attempt)],
    ),
    "rounds_planned": ("Rounds that the job has.", (), lambda job: [([], job.rounds)]),
    "version_number": ("Newest version of the adapter.", (), lambda job: [([], job.version)]),
    "round_delivered_devices": (
        "Devices whose update counts in the open round.",
        (),
        lambda job: [([], job.delivered)],
    ),
    "round_refused_devices": (
        "Devices that an update was refused of in the open round.",
        (),
        lambda job: [([], job.refused)],
    ),
    "round_quorum_devices": (
        "Devices whose update a round is not merged without.",
        (),
        lambda job: [([], job.policy.quorum)],
    ),
    "round_deadline_timestamp_seconds": (
        "When the open round's deadline is, since 1970.",
        (),
        lambda job: [] if job.deadline is None else [([], job.deadline)],
    ),
}
"""Name → its help, its labels behind `job`, and its samples."""


class FleetCollector(Collector):
    """Turn the snapshots of one moment into metrics."""

    def __init__(self, fleet: FleetReader) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; a job whose state can't be read counts as unreadable."""
        seen = self._fleet.fleet()
        states = self._fleet.jobs()
        unreadable = GaugeMetricFamily(
            "tunefleet_jobs_unreadable", "State folders that can't be read."
        )
        unreadable.add_metric([], len(seen.unreadable))
        yield unreadable
        jobs = [(job, states[job.name]) for job in seen.jobs if job.name in states]
        for name, (words, labels, samples) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"tunefleet_{name}", words, labels=["job", *labels])
            for job, _ in jobs:
                for values, value in samples(job):
                    gauge.add_metric([job.name, *values], float(value))
            yield gauge
        yield from _last_round(jobs)
        yield from _totals([(job, state.totals(BUCKETS_S)) for job, state in jobs])


def _last_round(jobs: Sequence[tuple[JobView, StateView]]) -> Iterator[Metric]:
    """Yield what the last merged round came to."""
    loss = GaugeMetricFamily(
        "tunefleet_held_out_loss_nats",
        "Mean held-out loss per token of the version that the last round with losses began with.",
        labels=["job"],
    )
    residual = GaugeMetricFamily(
        "tunefleet_merge_residual_ratio",
        "What the last merge could not hold, as a share of the norm.",
        labels=["job"],
    )
    ranks = GaugeMetricFamily(
        "tunefleet_round_rank_devices",
        "Devices by the rank of their update, in the last merged round.",
        labels=["job", "rank"],
    )
    for job, state in jobs:
        rounds = state.rounds(limit=3)
        with_loss = next((view for view in rounds if view.loss is not None), None)
        if with_loss is not None and with_loss.loss is not None:
            loss.add_metric([job.name], with_loss.loss)
        merged = next((view for view in rounds if view.merge_s is not None), None)
        if merged is None:
            continue
        if merged.residual is not None:
            residual.add_metric([job.name], merged.residual)
        for rank, devices in merged.ranks.items():
            ranks.add_metric([job.name, str(rank)], devices)
    yield from (loss, residual, ranks)


def _totals(jobs: Sequence[tuple[JobView, Totals]]) -> Iterator[Metric]:
    """Yield what has come in a job's whole life."""
    merge = HistogramMetricFamily(
        "tunefleet_merge_duration_seconds", "How long merges took.", labels=["job"]
    )
    updates = CounterMetricFamily(
        "tunefleet_updates", "Updates that were counted or refused.", labels=["job", "outcome"]
    )
    up = CounterMetricFamily(
        "tunefleet_update_bytes", "Bytes of the updates that counted.", labels=["job"]
    )
    down = CounterMetricFamily(
        "tunefleet_download_bytes",
        "Bytes of the versions that counted updates started from, reckoned.",
        labels=["job"],
    )
    for job, total in jobs:
        bounds = [*map(floatToGoString, BUCKETS_S), "+Inf"]
        merge.add_metric(
            [job.name], list(zip(bounds, total.merges_within, strict=True)), total.merge_s
        )
        updates.add_metric([job.name, "counted"], total.counted)
        updates.add_metric([job.name, "refused"], total.refused)
        up.add_metric([job.name], job.up_bytes)
        down.add_metric([job.name], job.down_bytes)
    yield from (merge, updates, up, down)


def expose(fleet: FleetReader, accept: str = "") -> tuple[bytes, str]:
    """Return what Prometheus reads, of this process too, and its content type.

    `accept` is what the asker can read: the text format, or OpenMetrics if it prefers that.
    """
    registry = CollectorRegistry()
    registry.register(FleetCollector(fleet))
    ProcessCollector(registry=registry)
    encode, kind = choose_encoder(accept)
    return encode(registry), kind
