"""What a job's `[rule_settings]` may say where its rule is a trust strategy."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from aggregator.merge.lowrank import Split
from aggregator.merge.rules import MOMENTUM
from aggregator.merge.settings import Settings, read_settings
from protocol.messages import PersonalRule

Strategy = PersonalRule
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def _temperature(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
    if value != "auto" and not number:
        raise ValueError(f"must be a number over 0 and below 1e6 or 'auto', not {value!r}")
    return value


class TrustSettings(BaseModel):
    """Settings of the three trust strategies."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    split: Split = "balanced"
    """How singular values lie on the factors of a product, see `lowrank.split_factors`."""
    temperature: Annotated[float | Literal["auto"], BeforeValidator(_temperature)] = "auto"
    """Trust is softmax(score / temperature); `auto` lets every device's move by trial."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = MOMENTUM
    """β: how much of what the common adapter moved in the last round is added to all again."""
    candidates: Annotated[int, Field(ge=1, le=64)] = 8
    """Adapters offered a round, to all devices alike (`trust-validation`)."""


def read_trust_settings(given: Settings) -> TrustSettings:
    """Return the settings of a trust strategy from a job's table.

    Raises:
        BadRuleSettings: there is no such setting (the nearest is named), or its value can't be.
    """
    return read_settings(TrustSettings, given)


def strategy_of(rule: str) -> Strategy | None:
    """Return the trust strategy that a job's rule names, or None where it names a merge rule."""
    return next((strategy for strategy in STRATEGIES if strategy == rule), None)
