"""Settings of a job that do nothing where they stand: allowed, and said when it is served."""

from __future__ import annotations

from collections.abc import Iterator

from aggregator.merge.combine import factor_average
from aggregator.merge.rule import Rule
from aggregator.merge.rules import RULES
from aggregator.merge.settings import RuleSettings
from aggregator.merge.weighting import evenly
from aggregator.rounds import Policy
from protocol.messages import Job


def idle_settings(job: Job, policy: Policy) -> Iterator[str]:
    """Yield a line for each setting that comes to nothing with the others; of a built-in rule.

    Raises:
        BadRuleSettings: the rule has no such setting, or cannot use its value.
    """
    training = job.training
    if training.optimizer == "adafactor" and "clip_norm" in training.model_fields_set:
        yield 'training.clip_norm does nothing with optimizer = "adafactor"'
    rule = RULES.get(job.rule)
    if rule is None:
        return
    settings = rule.read(job.rule_settings)
    for name in sorted(settings.model_fields_set):
        if needed := _needed(name, settings, rule, policy):
            yield f"rule_settings.{name} does nothing without {needed}"
    if job.layers == "fit" and rule.weighting.spread is evenly:
        kept = ", ".join(name for name, one in RULES.items() if one.weighting.spread is not evenly)
        yield (
            f'layers = "fit" with rule = "{job.rule}" averages a block that few devices train down '
            f"to nothing; rules that do not: {kept}"
        )


def _needed(name: str, settings: RuleSettings, rule: Rule, policy: Policy) -> str:
    """Return what a setting does nothing without, where that is not there."""
    carries = settings.momentum or settings.error_feedback
    # With what is carried, or came from an older version, an average of factors is a product.
    is_product = carries or policy.buffer or policy.late_updates
    if name.startswith("discrepancy_") and settings.weights != "discrepancy":
        return 'weights = "discrepancy"'
    if name == "memory_rank" and not carries:
        return "momentum or error_feedback"
    if name == "split" and rule.combination is factor_average and not is_product:
        return "momentum or error_feedback: the rule averages the factors as they are"
    return ""
