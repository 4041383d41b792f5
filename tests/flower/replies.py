"""Replies that a strategy takes and leaves out, checked where Flower is: see test_flower.py."""

from __future__ import annotations

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from aggregator.errors import ConfigError
from aggregator.flower_strategy import TunefleetStrategy
from edge_client.learning import learn
from edge_client.update import make_update
from protocol.adapter import Adapter
from protocol.flower import adapter_of, reply
from protocol.messages import Job, Round, describe_file
from tests.flower.fleet import MadeUpLearner, made_job


class TwoNodes:
    """A grid of two nodes, of which the strategy asks no more than their ids."""

    def get_node_ids(self) -> list[int]:
        return [1, 2]


def answer(job: Job, shared: Adapter, number: int, **changed: object) -> RecordDict:
    """Return a node's reply; `changed` is what its manifest says otherwise, `data` other bytes."""
    learner = MadeUpLearner(number)

    def train(received: Adapter, frozen: Adapter | None) -> object:
        return learner.train(job, received, frozen, round_number=1, drawn_rows=0)

    learned = learn(job, f"node-{number}", shared, learner.rank, 1, train)
    now = Round(job=job.job, number=1, state="open", version=1)
    name = f"node-{number}"
    manifest, data = make_update(job, now, name, learned, learner.text, held_out_loss=1.0)
    if "data" in changed:
        data = changed.pop("data")
        changed["file"] = describe_file(data)
    return reply(manifest.model_copy(update=changed), data)


def weights(job: Job, *second: RecordDict | Error, limit: float | None = None) -> set[str]:
    """Return who counts in a round with a good reply of node 1 and those of node 2."""
    if limit is not None:
        job = job.model_copy(
            update={"limits": job.limits.model_copy(update={"update_norm": limit})}
        )
    strategy = TunefleetStrategy(job)
    start = strategy.initial_arrays()
    asked = [*strategy.configure_train(1, start, ConfigRecord(), TwoNodes())]
    assert len(asked) == 2 and {m.metadata.message_type for m in asked} == {MessageType.TRAIN}
    contents = [answer(job, adapter_of(job, start), 0), *second]
    sent = (asked + asked)[: len(contents)]
    replies = [Message(c, reply_to=m) for c, m in zip(contents, sent, strict=True)]
    merged, _ = strategy.aggregate_train(1, replies)
    found = set(strategy.merged.get(1, {}))
    assert (merged is not None) == bool(found)
    return found


def main() -> None:
    # Outside of a run nobody has said whose messages these are.
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    job = made_job("anchored")
    shared = adapter_of(job, TunefleetStrategy(job).initial_arrays())
    good = answer(job, shared, 1)
    assert weights(job, good) == {"node-0", "node-1"}
    print("good")
    assert weights(job, answer(job, shared, 1, round=2)) == {"node-0"}
    print("other-round")
    assert weights(job, good, answer(job, shared, 1)) == {"node-0", "node-1"}
    print("twice")
    assert weights(job, answer(job, shared, 1, data=b"nothing")) == {"node-0"}
    print("no-tensors")
    assert weights(job, good, limit=1e-6) == set()
    print("too-large")
    assert weights(job, Error(code=0, reason="it burns")) == {"node-0"}
    print("error")
    try:
        TunefleetStrategy(job.model_copy(update={"rule": "trust-weights"}))
    except ConfigError:
        pass
    else:
        raise AssertionError("personal adapters have no place in a Flower round")
    assert np.isfinite(shared.scale)


if __name__ == "__main__":
    main()
