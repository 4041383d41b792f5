"""The control arm: every device trains all weights of the base, and the weights are averaged.

FedAvg (arXiv 1602.05629) without any adapter. No device of an unequal fleet could do it: it takes
the gradients and moments of every weight, and sends the whole model each round.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch

from benchmarks.simulation import Simulation
from edge_client.data import Batch
from edge_client.model import load_model
from edge_client.trainer.base import step_batches
from edge_client.trainer.loss import full_cross_entropy
from edge_client.trainer.torch_trainer import ADAM_BETAS, attention_mask
from protocol.messages import Job

Weights = dict[str, torch.Tensor]


class FullWeights:
    """Train and average whole models on the devices of a simulation.

    The model is one of its own: the trainer's gives its base no gradients.
    """

    def __init__(self, fleet: Simulation) -> None:
        self._fleet = fleet
        self._model = load_model(fleet.folder, torch.float32)
        self._parameters: Weights = dict(self._model.named_parameters())

    def run(self, job: Job, on_round: Callable[[int], None]) -> tuple[float, dict[str, float]]:
        """Run a job; return the mean loss on the trust splits, and each device's held-out loss."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        streams = {d.name: self._fleet.stream(d) for d in self._fleet.devices}
        shared = {name: p.detach().clone() for name, p in self._parameters.items()}
        for number in range(1, job.rounds + 1):
            total = {name: torch.zeros_like(p) for name, p in shared.items()}
            for device in self._fleet.devices:
                self._put(shared)
                self._train(job, streams[device.name])
                for name, parameter in self._parameters.items():
                    total[name] += parameter.detach() / len(self._fleet.devices)
            shared = total
            self._put(shared)
            on_round(number)
        trust = fmean(self.losses("trust").values())
        return trust, self.losses("held_out")

    @torch.no_grad()
    def losses(self, split: str) -> dict[str, float]:
        """Return each device's loss on a split with the weights as they are, nats a token."""
        found = {}
        self._model.eval()
        for device in self._fleet.devices:
            batches = self._fleet.batches(device, split)
            total = sum(float(self._loss(batch)) for batch in batches)
            found[device.name] = total / sum(batch.tokens for batch in batches)
        return found

    @torch.no_grad()
    def _put(self, weights: Weights) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def _train(self, job: Job, stream: object) -> None:
        settings = job.training
        parameters = list(self._parameters.values())
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=ADAM_BETAS, weight_decay=0.0
        )
        self._model.train()
        for step in range(1, settings.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, step / (settings.warmup_steps + 1))
            batches = step_batches(stream, settings.tokens_per_step)  # type: ignore[arg-type]
            counted = sum(batch.tokens for batch in batches)
            for batch in batches:
                (self._loss(batch) / counted).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _loss(self, batch: Batch) -> torch.Tensor:
        logits = self._model(
            input_ids=torch.from_numpy(batch.ids),
            position_ids=torch.from_numpy(batch.positions),
            attention_mask=attention_mask(batch, self._model.dtype),
        ).logits
        return full_cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten())
