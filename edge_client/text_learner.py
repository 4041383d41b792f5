"""Learning from text in this process, without an agent: for a Flower app, or an experiment.

An agent's training runs in a process of its own, within a plan of its memory. Here the sizes are
the caller's, and nothing looks after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_client.learning import learning_rate
from edge_client.memory import optimizer_of
from edge_client.plan import Backend, Plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from protocol.adapter import Adapter
from protocol.factors import trained_factors
from protocol.messages import Job

NOTHING = Adapter({}, 1.0)


class TextLearner:
    """Train `rank` of `held` directions on the text of some files and folders.

    `model` is the base's folder, or for `onnx` that of an artifact set. It is what
    `edge_client.flower_app` asks for.

    Raises:
        DataError: there is no text to train on.
        ModelError: the base can't be loaded.
    """

    def __init__(
        self,
        model: Path,
        data: Sequence[Path],
        *,
        rank: int,
        held: int,
        backend: Backend = "torch",
        dtype: str = "f32",
        seq_len: int = 256,
        micro_batch: int = 1,
        threads: int = 1,
        seed: int = 0,
    ) -> None:
        from edge_client.data import pack, read_examples, split_examples, tokenize
        from edge_client.trainer.backend import open_tokenizer, open_trainer

        self.rank, self.held = rank, held
        self._seed = seed
        self._plan = Plan(rank, held, micro_batch, seq_len, False, dtype, threads, 0.0, 0.0)
        reading = read_examples(data)
        splits = split_examples(reading.examples, seed=seed, problems=reading.problems)
        tokenizer = open_tokenizer(backend, model)
        self._rows = {
            name: pack(
                tokenize(getattr(splits, name), tokenizer, max_tokens=seq_len), seq_len, seed=seed
            )
            for name in ("train", "held_out")
        }
        tokens = {
            name: sum(int(np.count_nonzero(row.segments)) for row in rows)
            for name, rows in self._rows.items()
        }
        problems = tuple(map(str, reading.problems))
        self.text = TextReport(tokens["train"], tokens["held_out"], problems)
        self._trainer = open_trainer(backend, model, dtype=dtype, threads=threads)

    def train(
        self,
        job: Job,
        received: Adapter,
        frozen: Adapter | None,
        *,
        round_number: int,
        drawn_rows: int,
    ) -> tuple[Adapter, TrainReport]:
        """Return `received` after a round's training beside the `frozen` directions."""
        from edge_client.data import BatchStream

        rows, size = self._rows["train"], self._plan.micro_batch
        stream = BatchStream(rows, size, seed=self._seed, drawn_rows=drawn_rows)
        plan = replace(self._plan, optimizer=optimizer_of(job.training))
        self._trainer.load(received, frozen, plan)
        report = self._trainer.train(
            stream,
            settings=job.training,
            learning_rate=learning_rate(job, received.rank, round_number),
            pruning=job.pruning if job.pruning.enabled else None,
            on_step=lambda step, loss: None,
            factors=trained_factors(job.training.factors, round_number),
        )
        drawn = stream.state()["drawn_rows"]
        return self._trainer.adapter(), replace(report, drawn_rows=drawn)

    def evaluate(self, adapter: Adapter) -> float:
        """Return the loss on held-out text, nats a token."""
        from edge_client.data import evaluation_batches

        self._trainer.load(NOTHING, adapter, self._plan)
        batches = evaluation_batches(self._rows["held_out"], self._plan.micro_batch)
        return self._trainer.evaluate(batches)
