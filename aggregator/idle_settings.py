"""Settings of a job that do nothing where they stand: allowed, and said when it is served."""

from __future__ import annotations

from collections.abc import Iterator

from aggregator.merge.combine import factor_average
from aggregator.merge.robust import krum_needs, opposed_needs
from aggregator.merge.rule import Rule
from aggregator.merge.rules import RULES
from aggregator.merge.settings import KrumSettings, RuleSettings
from aggregator.merge.weighting import evenly
from aggregator.rounds import Policy
from protocol.messages import Job, Pruning

UNDISCOUNTED = "counts a late update as if it were of today"


def idle_settings(job: Job, policy: Policy) -> Iterator[str]:
    """Yield a line for each setting that comes to nothing with the others; of a built-in rule.

    Raises:
        BadRuleSettings: the rule has no such setting, or cannot use its value.
    """
    training, rule = job.training, RULES.get(job.rule)
    if training.optimizer == "adafactor" and "clip_norm" in training.model_fields_set:
        yield 'training.clip_norm does nothing with optimizer = "adafactor"'
    if training.learning_rate_last != 1 and job.rounds == 1:
        yield "training.learning_rate_last does nothing with rounds = 1"
    yield from _of_pruning(job)
    if job.probe is not None and job.rule != "trust-predictions":
        yield '[probe] does nothing without rule = "trust-predictions"'
    if "candidates" in job.rule_settings and job.rule in ("trust-weights", "trust-predictions"):
        yield 'rule_settings.candidates does nothing without rule = "trust-validation"'
    if job.is_personal and policy.late_updates:
        yield f'policy.late_updates with rule = "{job.rule}" {UNDISCOUNTED}'
    if rule is None:
        return
    settings = rule.read(job.rule_settings)
    for name in sorted(settings.model_fields_set):
        if needed := _needed(name, settings, rule, policy):
            yield f"rule_settings.{name} does nothing without {needed}"
        if name in ("clip", "opposed") and rule.combination is factor_average:
            yield (
                f'rule_settings.{name} bounds nothing with rule = "{job.rule}": it goes by the '
                "change of a device's product, and factors can be large where that is small"
            )
    if job.layers == "fit" and rule.weighting.spread is evenly:
        kept = ", ".join(name for name, one in RULES.items() if one.weighting.spread is not evenly)
        yield (
            f'layers = "fit" with rule = "{job.rule}" averages a block that few devices train down '
            f"to nothing; rules that do not: {kept}"
        )
    if policy.late_updates and not policy.buffer and not settings.staleness:
        yield f"policy.late_updates without rule_settings.staleness = true {UNDISCOUNTED}"
    yield from _too_few(settings, policy)


def _of_pruning(job: Job) -> Iterator[str]:
    pruning, usual = job.pruning, Pruning()
    if not pruning.enabled:
        for name in ("gamma", "penalty", "rank_min"):
            if getattr(pruning, name) != getattr(usual, name):
                yield f"pruning.{name} does nothing with pruning.enabled = false"
    elif pruning.rank_min > job.rank:
        yield (
            f"pruning cuts nothing: pruning.rank_min = {pruning.rank_min} is over the job's "
            f"largest rank, {job.rank}"
        )


def _too_few(settings: RuleSettings, policy: Policy) -> Iterator[str]:
    """Yield what leaves nobody out of the smallest round that is merged."""
    least = policy.buffer or policy.quorum
    needed = {"opposed": opposed_needs(settings.opposed)}
    if isinstance(settings, KrumSettings):
        needed["byzantine"] = krum_needs(settings.byzantine)
    lever = "buffer" if policy.buffer else "quorum"
    for name, devices in needed.items():
        if least < devices:
            yield (
                f"rule_settings.{name} = {getattr(settings, name)} leaves nobody out of a round of "
                f"fewer than {devices} devices: raise policy.{lever} to that; it is {least}"
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
    if name == "staleness" and settings.staleness and not policy.behind:
        return "late updates (policy.late_updates, or buffered rounds)"
    if name == "split" and rule.combination is factor_average and not is_product:
        return "momentum or error_feedback: the rule averages the factors as they are"
    return ""
