"""A Flower ClientApp that learns as our devices do: its own rank, drawn directions, self-pruning.

    def open_learner(job: Job, context: Context) -> FlowerLearner: ...
    app = client_app(open_learner)

Its other half is `aggregator.flower_strategy`. What a learner has to do is train some directions of
the shared adapter beside frozen ones; which, how fast and what of them is sent is done here. What a
node must remember from round to round, its rank and how far it is in its text, is in its context,
apart for each job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edge_client.learning import learn
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from edge_client.update import make_update
from protocol.adapter import Adapter
from protocol.flower import ARRAYS, METRICS, adapter_of, job_of, reply
from protocol.messages import Job, Round

STATE = "tunefleet "


class FlowerLearner(Protocol):
    """Train a node's own text, `rank` directions of the `held` that it has room for.

    `edge_client.text_learner.TextLearner` is one.
    """

    rank: int
    held: int
    text: TextReport

    def train(
        self,
        job: Job,
        received: Adapter,
        frozen: Adapter | None,
        *,
        round_number: int,
        drawn_rows: int,
    ) -> tuple[Adapter, TrainReport]:
        """Return `received` after training for `job.training`, beside the `frozen` directions.

        Its text begins after the `drawn_rows` that earlier rounds have drawn.
        """
        ...

    def evaluate(self, adapter: Adapter) -> float:
        """Return the loss on held-out text, nats a token."""
        ...


OpenLearner = Callable[[Job, Context], FlowerLearner]


def device_name(context: Context) -> str:
    """Return a node's name in a job: by its partition where it has one, so that runs repeat."""
    partition = context.node_config.get("partition-id")
    return f"node-{context.node_id if partition is None else partition}"


def client_app(open_learner: OpenLearner) -> ClientApp:
    """Return an app that answers training and evaluation with the learner of its node."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # flwr is in an environment of its own
    def train(message: Message, context: Context) -> Message:
        job, number = job_of(message.content)
        learner, device = open_learner(job, context), device_name(context)
        shared = adapter_of(job, message.content.array_records[ARRAYS])
        kept = STATE + job.job
        known = context.state.config_records.get(kept, ConfigRecord({"rank": learner.rank}))
        rank, drawn = _number(known, "rank"), _number(known, "drawn-rows")
        rank = min(rank, learner.rank)
        held = shared.truncated(max(learner.held, rank) if job.remainder == "frozen" else rank)
        loss = learner.evaluate(held)
        learned = learn(
            job,
            device,
            held,
            rank,
            number,
            lambda received, frozen: learner.train(
                job, received, frozen, round_number=number, drawn_rows=drawn
            ),
        )
        now = Round(job=job.job, number=number, state="open", version=number)
        manifest, data = make_update(job, now, device, learned, learner.text, held_out_loss=loss)
        goes_on = {"rank": learned.rank, "drawn-rows": learned.report.drawn_rows}
        context.state[kept] = ConfigRecord(goes_on)
        return Message(reply(manifest, data), reply_to=message)

    @app.evaluate()  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        job, _ = job_of(message.content)
        shared = adapter_of(job, message.content.array_records[ARRAYS])
        loss = open_learner(job, context).evaluate(shared)
        return Message(RecordDict({METRICS: MetricRecord({"loss": loss})}), reply_to=message)

    return app


def _number(record: ConfigRecord, name: str) -> int:
    value = record.get(name, 0)
    return value if isinstance(value, int) else 0
