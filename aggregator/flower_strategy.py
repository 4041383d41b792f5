"""A Flower strategy with our merge rules: adapters of unequal rank, directions, discounts.

    job = Job(job="notes", base=base, scale=2.0, ladder=[2, 4, 8], rule="anchored", rounds=3)
    strategy = TunefleetStrategy(job, min_available_nodes=3)
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=job.rounds)
    adapter = adapter_of(job, result.arrays)

Its other half is `edge_client.flower_app`. What of replies is taken, and how, is as over MQTT: the
manifest is checked, the tensors must be those that it implies, and the change within the job's
bounds. A reply that is not is left out with a warning, and never stops a round.
"""

from __future__ import annotations

from collections.abc import Iterable
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import sample_nodes

from aggregator.engine import IN_PROCESS, Engine
from aggregator.errors import ConfigError, MergeError
from aggregator.merge import Memory, RoundView, Update, merge
from aggregator.personal import strategy_of
from aggregator.updates import read_update, unfit, verify
from protocol.adapter import Adapter, initial_adapter
from protocol.chunks import file_hash
from protocol.errors import BadTensors, ProtocolError
from protocol.factors import trained_factors
from protocol.flower import (
    ARRAYS,
    METRICS,
    adapter_of,
    adapter_to_arrays,
    blob_of,
    manifest_of,
    request,
)
from protocol.messages import Job, UploadManifest, upload_id


class TunefleetStrategy(Strategy):  # type: ignore[misc]  # flwr is in an environment of its own
    """Merge what nodes have trained by the job's rule; `engine` works the modules out.

    A round asks `fraction_train` of the nodes that are there, `min_train_nodes` at least, once
    there are `min_available_nodes`. With `evaluate` all nodes measure each merged adapter too.

    Raises:
        ConfigError: the job is one for personal adapters, which Flower's rounds have no place for.
    """

    def __init__(
        self,
        job: Job,
        *,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
        evaluate: bool = False,
        engine: Engine = IN_PROCESS,
    ) -> None:
        if strategy_of(job.rule) is not None:
            raise ConfigError(
                f"rule {job.rule!r} gives each device an adapter of its own, and a Flower strategy "
                "sends all nodes the same: take another rule"
            )
        self.job = job
        self._fraction, self._evaluate = fraction_train, evaluate
        self._least, self._available = min_train_nodes, min_available_nodes
        self._engine = engine
        self._started: Adapter | None = None
        """The version that the round's nodes have been sent."""
        self._memory = Memory()
        self.merged: dict[int, dict[str, float]] = {}
        """Round → what each device counted."""

    def initial_arrays(self) -> ArrayRecord:
        """Return version 1, a product of zero, to `start` with."""
        job = self.job
        first = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        return adapter_to_arrays(job, first)

    def summary(self) -> None:
        """Log what this strategy is."""
        job = self.job
        log(INFO, "\t├── Job %s: rule %s, ranks %s", job.job, job.rule, job.ladder)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the shared adapter and the job to the nodes of a round."""
        self._started = adapter_of(self.job, arrays)
        wanted = int(len([*grid.get_node_ids()]) * self._fraction)
        nodes, _ = sample_nodes(grid, self._available, max(wanted, self._least))
        return self._messages(server_round, arrays, config, nodes, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the updates of a round; None where there is none to merge."""
        job, started = self.job, self._started
        assert started is not None, "replies are to what configure_train has sent"
        taken: dict[str, tuple[UploadManifest, Update]] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                log(WARNING, "node %s failed: %s", node, reply.error.reason)
                continue
            try:
                manifest = manifest_of(reply.content)
                if manifest.device in taken:
                    raise BadTensors(f"device {manifest.device} has two updates in it")
                taken[manifest.device] = manifest, self._read(manifest, reply, server_round)
            except ProtocolError as error:
                log(WARNING, "the update of node %s is refused: %s", node, error)
        log(INFO, "round %s: updates of %s", server_round, ", ".join(sorted(taken)) or "nobody")
        if not taken:
            return None, None
        view = RoundView(
            started,
            [taken[device][1] for device in sorted(taken)],
            job.base.modules,
            job.rank,
            seed=job.seed + server_round,
            memory=self._memory,
            trained=trained_factors(job.training.factors, server_round),
        )
        try:
            merged = merge(job.rule, view, settings=job.rule_settings, engine=self._engine)
        except MergeError as error:
            log(WARNING, "round %s is not merged: %s", server_round, error)
            return None, None
        for warning in merged.warnings:
            log(WARNING, "round %s: %s", server_round, warning)
        self._memory, self.merged[server_round] = merged.memory, merged.weights
        means = _mean_metrics([manifest for manifest, _ in taken.values()])
        told = MetricRecord({"devices": len(taken), "residual": merged.residual, **means})
        return adapter_to_arrays(job, merged.adapter), told

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the merged adapter to all nodes, if they are to measure it."""
        nodes = [*grid.get_node_ids()] if self._evaluate else []
        return self._messages(server_round, arrays, config, nodes, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the mean loss over the nodes that have told one, each alike."""
        losses = [
            float(value)
            for reply in replies
            if not reply.has_error() and METRICS in reply.content.metric_records
            for name, value in reply.content.metric_records[METRICS].items()
            if name == "loss" and isinstance(value, (int, float))
        ]
        return MetricRecord({"loss": sum(losses) / len(losses)}) if losses else None

    def _messages(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Iterable[int],
        kind: str,
    ) -> list[Message]:
        content = request(self.job, arrays, config, server_round)
        return [Message(content, dst_node_id=node, message_type=kind) for node in nodes]

    def _read(self, manifest: UploadManifest, reply: Message, server_round: int) -> Update:
        """Return what a reply says, checked as an upload is.

        Raises:
            ProtocolError: it is not what the job and its manifest imply.
        """
        job, started = self.job, self._started
        assert started is not None, "as above"
        upload = upload_id(manifest.device, job.job, server_round)
        place = (manifest.job, manifest.round, manifest.version, manifest.upload)
        if place != (job.job, server_round, server_round, upload):
            raise BadTensors("it is of another job or round")
        if why := unfit(job, manifest):
            raise BadTensors(why)
        if ARRAYS not in reply.content.array_records:
            raise BadTensors("it has no arrays")
        data = blob_of(reply.content.array_records[ARRAYS])
        if (len(data), file_hash(data)) != (manifest.file.bytes, manifest.file.sha256):
            raise BadTensors("its bytes are not those that it announces")
        base = Started(started)
        if why := verify(job, base, manifest, data).wrong:
            raise BadTensors(why)
        return read_update(job, base, manifest, data)


class Started:
    """Hold the one version that all updates of a round start from."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def base(self, manifest: UploadManifest) -> Adapter:
        return self._adapter


def _mean_metrics(manifests: list[UploadManifest]) -> dict[str, float]:
    """Return the mean of each metric over the devices that have told it, by their examples."""
    found: dict[str, float] = {}
    for name in sorted({name for manifest in manifests for name in manifest.metrics}):
        told = [(m.metrics[name], m.examples) for m in manifests if name in m.metrics]
        found[name] = sum(value * n for value, n in told) / sum(n for _, n in told)
    return found
