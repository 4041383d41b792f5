"""What a job's `[rule_settings]` may say to a merge rule.

`RuleSettings` are those that every rule has; a robust rule adds its own. They are read once, when
the aggregator starts, and again where a round is merged: nothing else looks at the raw table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from aggregator.errors import BadRuleSettings
from aggregator.merge.lowrank import Split
from protocol.mistakes import did_you_mean, first_mistake, nearest

Settings = Mapping[str, object]
NO_SETTINGS: Settings = MappingProxyType({})
Weights = Literal["samples", "equal", "loss-reduction", "discrepancy"]


MOST_DEVICES = 1_000_000


def _clip(value: object) -> object:
    if value is not None and value != "median" and not _positive(value):
        raise ValueError(f"must be a number over 0 and below 1e30 or 'median', not {value!r}")
    return value


def _byzantine(value: object) -> object:
    count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_DEVICES
    if not count and not (isinstance(value, float) and 0 <= value < 0.5):
        raise ValueError(
            f"must be a whole number of devices, at most {MOST_DEVICES}, or a share from 0 to "
            f"below 0.5, not {value!r}"
        )
    return value


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


class RuleSettings(BaseModel):
    """Settings of every rule; each does nothing unless it is given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    split: Split = "balanced"
    """How singular values lie on the factors of a product, see `lowrank.split_factors`."""
    weights: Weights | None = None
    """What a device's share goes by, instead of what the rule takes by itself."""
    discrepancy_slope: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    discrepancy_offset: Annotated[float, Field(ge=0, le=1e6)] = 0.1
    cap: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest share of one device."""
    clip: Annotated[float | Literal["median"] | None, BeforeValidator(_clip)] = None
    """Largest norm of a device's change, or the round's median of them."""
    opposed: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Largest share of a round's devices left out as their changes point against the others'."""
    staleness: bool = False
    """Count (1+τ)^−½ of a change that starts from a version τ behind."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """β: how much of the last round's change is added again; a rule may have its own default."""
    error_feedback: bool = False
    """Whether what the rank could not hold is added to the next round."""
    memory_rank: Annotated[int, Field(ge=1)] | None = None
    """Largest rank of what `momentum` and `error_feedback` carry; the shared rank by default."""


class GeomedSettings(RuleSettings):
    """Settings of the geometric median, see `robust.geometric_median`."""

    smoothing: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Distances below this part of the median norm count as that."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-9
    """Stop once the shares move by no more than this in sum."""
    iterations: Annotated[int, Field(ge=1, le=10_000)] = 200


class KrumSettings(RuleSettings):
    """Settings of Multi-Krum, see `robust.krum`."""

    byzantine: Annotated[int | float, BeforeValidator(_byzantine)] = 0.2
    """How many devices, or what share of a round's, may be dishonest at most."""


OWNERS: Mapping[str, str] = {
    **dict.fromkeys(RuleSettings.model_fields, "a merge rule"),
    **dict.fromkeys(GeomedSettings.__annotations__, "geomed"),
    **dict.fromkeys(KrumSettings.__annotations__, "krum"),
    "temperature": "a rule for personal adapters",
    "candidates": "trust-validation",
}
"""What has a setting that not every rule has, by its name."""
Kind = TypeVar("Kind", bound=BaseModel)


def read_settings(kind: type[Kind], given: Settings) -> Kind:
    """Return settings of a kind from a job's table.

    Raises:
        BadRuleSettings: there is no such setting (the nearest is named), or its value can't be.
    """
    known = [*kind.model_fields]
    for name in sorted(set(given) - set(known)):
        owner = OWNERS.get(name)
        hint = f"only {owner} has it" if owner else did_you_mean(nearest(name, known), known)
        raise BadRuleSettings(f"the rule has no setting {name!r}; {hint}")
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise BadRuleSettings(first_mistake(error)) from None
