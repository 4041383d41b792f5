"""A learner for a Flower app, or an experiment, that trains on real text with the real base."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from base_tiny import PATH
from edge_client.learning import learn
from edge_client.model import describe_model
from edge_client.text_learner import TextLearner
from protocol.adapter import initial_adapter
from protocol.messages import Job


def test_it_learns_its_directions_and_goes_on_in_its_text(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"The {n}th kettle is on the {n}th shelf." for n in range(400)))
    job = Job(
        job="notes",
        base=describe_model("base-tiny"),
        scale=2.0,
        ladder=[2, 4],
        training={"steps": 4, "tokens_per_step": 128, "max_tokens": 64, "learning_rate": 4e-3},
    )
    learner = TextLearner(PATH, [text], rank=2, held=4, seq_len=64)
    shared = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
    before, drawn, losses = learner.evaluate(shared), [], []
    for number in (1, 2):
        learned = learn(
            job,
            "node-0",
            shared,
            learner.rank,
            number,
            lambda received, frozen, n=number: learner.train(
                job, received, frozen, round_number=n, drawn_rows=drawn[-1] if drawn else 0
            ),
        )
        drawn.append(learned.report.drawn_rows)
        losses.append(learned.report.loss)
        assert learned.rank_trained == 2 and learned.report.tokens > 0
        assert all(f.rank == 2 and np.isfinite(f.b).all() for f in learned.change.layers.values())
        for name, at in learned.directions.items():
            shared.layers[name].b[:, at] += learned.change.layers[name].b
            shared.layers[name].a[at] += learned.change.layers[name].a
    assert drawn[1] > drawn[0] > 0
    assert learner.evaluate(shared) < before - 0.1
    assert learner.text.train_tokens > learner.text.held_out_tokens > 0

    whole = shared.truncated(2)
    came = {}
    for optimizer in ("fit", "adamw", "adafactor"):
        training = job.training.model_copy(update={"optimizer": optimizer})
        asked = job.model_copy(update={"training": training})
        came[optimizer], _ = learner.train(asked, whole, None, round_number=1, drawn_rows=0)
    (fit, adam, lean) = (
        next(iter(came[o].layers.values())).b for o in ("fit", "adamw", "adafactor")
    )
    assert np.array_equal(fit, adam) and not np.array_equal(fit, lean)
