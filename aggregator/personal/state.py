"""What the aggregator remembers of trust from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from aggregator.personal.answers import Answer
from aggregator.personal.temperature import Temperature


class TrustState(BaseModel):
    """Hold what devices have answered so far, and their temperatures; it is kept as JSON."""

    model_config = ConfigDict(frozen=True)

    losses: dict[str, dict[str, Annotated[float, Field(allow_inf_nan=False)]]] = {}
    """Device i → device j: loss of j's adapter less that of the one i was given, both on i's trust
    split in the same round. Levels of different rounds differ, differences far less."""
    temperatures: dict[str, Temperature] = {}
    offered: dict[str, int] = {}
    """Device → version with which its adapter was offered last."""

    def heard(self, answers: Mapping[str, Answer]) -> TrustState:
        """Return the state after the answers of a round."""
        losses, temperatures = dict(self.losses), dict(self.temperatures)
        for device, answer in answers.items():
            told = dict(answer.candidates)
            if answer.own is not None:
                told[device] = answer.own
            found = {other: loss - answer.received for other, loss in told.items()}
            losses[device] = {**losses.get(device, {}), **found}
            if answer.trial is not None:
                before = self.temperature(device)
                temperatures[device] = before.after(answer.received, answer.trial)
        return TrustState(losses=losses, temperatures=temperatures, offered=self.offered)

    def temperature(self, device: str) -> Temperature:
        return self.temperatures.get(device, Temperature())
