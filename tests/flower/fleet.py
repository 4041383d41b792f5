"""Three nodes of unequal rank in Flower's simulation: `python -m tests.flower.fleet OUT.npz`.

It runs in an environment with Flower and without torch: the learner moves what it is given by
numbers that follow from its node, its round and where they are. The same learner takes part in the
plain path in test_flower.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from protocol.adapter import Adapter, Factors
from protocol.messages import BaseModelInfo, Job

MODULES = {"model.layers.0.q": (30, 26), "model.layers.0.k": (3, 26), "model.layers.1.q": (30, 26)}
RANKS = (2, 4, 8)
ROUNDS = 3
RULES = ("anchored", "hetlora")


def made_job(rule: str) -> Job:
    base = BaseModelInfo(name="toy", sha256="0" * 64, parameters=1000, modules=MODULES)
    settings = {"momentum": 0.3} if rule == "anchored" else {}
    fields = {"job": rule, "base": base, "scale": 2.0, "ladder": RANKS, "rounds": ROUNDS}
    return Job.model_validate({**fields, "rule": rule, "rule_settings": settings})


class MadeUpLearner:
    """Learn without a model; node `number` has its rank, and as many tokens more."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rank, self.held = RANKS[number], RANKS[-1]
        self.text = TextReport(1000, 100, ())

    def train(
        self,
        job: Job,
        received: Adapter,
        frozen: Adapter | None,
        *,
        round_number: int,
        drawn_rows: int,
    ) -> tuple[Adapter, TrainReport]:
        size = 0.01 * (self.number + 1) * (1 + 0.1 * drawn_rows)
        layers = {
            name: Factors(f.a + moved(f.a.shape, size), f.b - moved(f.b.shape, size))
            for name, f in received.layers.items()
        }
        tokens = 100 * (self.number + 1)
        report = TrainReport(1, tokens, 1.0, 0.0, drawn_rows=drawn_rows + 1)
        return Adapter(layers, received.scale), report

    def evaluate(self, adapter: Adapter) -> float:
        """Return a number that tells one adapter from another."""
        return float(sum(np.abs(f.b).sum() for f in adapter.layers.values()))


def moved(shape: tuple[int, ...], size: float) -> np.ndarray:
    steps = np.sin(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)
    return (size * steps).astype(np.float32)


def main() -> None:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from aggregator.flower_strategy import TunefleetStrategy
    from edge_client.flower_app import client_app
    from protocol.flower import adapter_of

    found: dict[str, np.ndarray] = {}
    told: dict[str, object] = {}
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        for rule in RULES:
            job = made_job(rule)
            nodes = len(RANKS)
            strategy = TunefleetStrategy(job, min_available_nodes=nodes, evaluate=True)
            result = strategy.start(grid, strategy.initial_arrays(), num_rounds=ROUNDS)
            told[rule] = {
                "merged": strategy.merged,
                "losses": [m["loss"] for m in result.evaluate_metrics_clientapp.values()],
                "arrays": [len(result.arrays), str(next(iter(result.arrays.values())).dtype)],
            }
            for name, factors in adapter_of(job, result.arrays).layers.items():
                found[f"{rule} {name} a"], found[f"{rule} {name} b"] = factors.a, factors.b

    def learner(job: Job, context: Context) -> MadeUpLearner:
        return MadeUpLearner(int(context.node_config["partition-id"]))

    run_simulation(
        server,
        client_app(learner),
        num_supernodes=len(RANKS),
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}},
    )
    out = Path(sys.argv[1])
    np.savez(out, **found)
    out.with_suffix(".json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
