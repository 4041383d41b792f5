"""Say why a plan was chosen: which others there are, and what a device's accelerators are for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from device_profiles.schema import Accelerator
from edge_client.plan import Plan, fits, preference, sequence_lengths
from edge_client.prepare import Planning
from edge_client.wanted import Wanted


def alternatives(chosen: Plan | None, every: Sequence[Plan], shared_rank: int) -> list[Plan]:
    """Return the plans that say most beside the chosen one, best first; it is among them.

    They are of each rank the best, of the chosen rank the best of each way of training, and of the
    chosen way the next larger micro-batch. Where none of a kind fits it is the smallest of them.
    """

    def best(plans: Iterable[Plan]) -> list[Plan]:
        known = list(plans)
        fitting = [plan for plan in known if fits(plan)]
        if fitting:
            return [max(fitting, key=lambda plan: preference(plan, shared_rank))]
        return [min(known, key=lambda plan: plan.needs_mib)] if known else []

    told = [] if chosen is None else [chosen]
    for rank in sorted({plan.rank for plan in every}):
        told += best(plan for plan in every if plan.rank == rank)
    if chosen is not None:
        like = [p for p in every if _is_like(p, chosen)]
        for way in dict.fromkeys(plan.way for plan in like):
            told += best(plan for plan in like if plan.way == way)
        larger = [p for p in like if p.way == chosen.way and p.micro_batch > chosen.micro_batch]
        told += sorted(larger, key=lambda plan: plan.micro_batch)[:1]
    return sorted(
        dict.fromkeys(told),
        key=lambda plan: (fits(plan), preference(plan, shared_rank)),
        reverse=True,
    )


def why(chosen: Plan, planning: Planning, every: Sequence[Plan]) -> str:
    """Return in one sentence why a plan was chosen."""
    wanted = planning.wanted
    parts = []
    if chosen.blocks:
        parts.append(f"training all blocks does not fit, the last {chosen.blocks} do")
    if chosen.seq_len < next(sequence_lengths(wanted.training.max_tokens)):
        parts.append(
            f"no rank fits with whole sequences of {wanted.training.max_tokens} tokens, so they "
            f"are cut to {chosen.seq_len}"
        )
    parts.append(_why_rank(chosen, wanted))
    if chosen.optimizer == "adafactor" and wanted.training.optimizer == "fit":
        parts.append(_why_no_moments(every, wanted.shared_rank))
    like = [p for p in every if _is_like(p, chosen) and fits(p)]
    if len(like) > 1:
        parts.append(
            f"{len(like)} plans of that rank fit (by rows at a time, number format and "
            f"checkpointing), and this one is the fastest as measured "
            f"({chosen.predicted_tokens_s:.0f} tokens/s)"
        )
    else:
        parts.append("no other plan of that rank fits")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _is_like(plan: Plan, other: Plan) -> bool:
    """Say whether two plans learn the same, however they compute it."""
    return (plan.rank, plan.held, plan.optimizer) == (other.rank, other.held, other.optimizer)


def _why_no_moments(every: Sequence[Plan], shared_rank: int) -> str:
    fitting = [plan for plan in every if plan.optimizer == "adamw" and fits(plan)]
    if not fitting:
        return "with Adam's moments nothing of this length would fit"
    best = max(fitting, key=lambda plan: preference(plan, shared_rank))
    return f"with Adam's moments it would be rank {best.rank} of {best.held} held"


def _why_rank(chosen: Plan, wanted: Wanted) -> str:
    top = wanted.ladder[-1]
    if not wanted.shared_rank:
        held = "the job drops what is not trained"
    elif chosen.held >= wanted.shared_rank:
        held = f"all {chosen.held} directions of the shared adapter can be held"
    else:
        limit = _limit(wanted, chosen.rank, _above(wanted, chosen.held))
        verb = f"are held, all that {limit}" if limit else "can be held"
        held = f"{chosen.held} of the shared adapter's {wanted.shared_rank} directions {verb}"
    if chosen.rank == top:
        return f"{held}, and the largest rank of the job ({top}) fits"
    above = _above(wanted, chosen.rank)
    limit = _limit(wanted, above, max(above, chosen.held))
    return f"{held}, and rank {chosen.rank} is the largest that {limit or 'fits'}"


def _above(wanted: Wanted, rank: int) -> int:
    return next(r for r in wanted.ladder if r > rank)


def _limit(wanted: Wanted, rank: int, held: int) -> str:
    """Return in words what but memory is against `rank` of `held` directions; "" if nothing."""
    return wanted.traffic.why_not(rank, held) if wanted.traffic else ""


def on_accelerators(accelerators: Sequence[Accelerator]) -> list[str]:
    """Return a line on each kind of accelerator: what it can do here and what it can't."""
    lines = []
    for found in dict.fromkeys(accelerators):
        line = f"{found.name}: "
        if found.kind == "gpu":
            line += "not used; training runs on the CPU"
        else:
            line += (
                "can run an exported model (inference); can't train, for it computes fixed graphs "
                "without gradients, so training runs on the CPU"
            )
        if found.shares_system_memory:
            line += "; its memory is the system's, so what it takes counts against the same budget"
        lines.append(f"{line}.")
    return lines or ["No accelerator was found; training runs on the CPU."]
