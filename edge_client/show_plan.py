"""A plan for people, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from device_profiles.schema import DeviceProfile
from edge_client.backends import better, find_backends
from edge_client.config import Settings
from edge_client.errors import NoPlanFits
from edge_client.explain import alternatives, on_accelerators, why
from edge_client.plan import Backend, Plan, fits, sequence_lengths
from edge_client.prepare import Planning, block_choices, planning
from edge_client.saying import saying
from edge_client.wanted import wanted_of
from protocol.messages import Job

SILENT_S = 1.0
"""What was measured before is there at once, and needs no word."""


def show_plan(settings: Settings, job: Job, *, explain: bool, as_json: bool) -> None:
    """Plan for a job and print the plan; with `explain` others too, and why it was chosen.

    Raises:
        NoPlanFits: there is none; with `explain` the nearest ones have been printed.
        EdgeError: something else keeps this device from planning.
    """
    chosen, found, refused = _choose(settings, job)
    length = chosen.seq_len if chosen else list(sequence_lengths(job.training.max_tokens))[-1]
    every = found.every(length)
    reason = why(chosen, found, every) if chosen else str(refused)
    if as_json:
        print(json.dumps(_as_dict(chosen, found, every, reason, settings.profile), indent=1))
    else:
        _print(chosen, found, every, reason, settings.profile, explain=explain)
    if refused is not None:
        raise refused


def _choose(settings: Settings, job: Job) -> tuple[Plan | None, Planning, NoPlanFits | None]:
    """Return the plan as an agent would make it, or why there is none."""
    backends = find_backends(settings, job)
    choices = {
        backend: _choose_with(settings, job, folder, backend)
        for backend, folder in backends.folders.items()
    }
    plans: dict[Backend, Plan | NoPlanFits] = {}
    for backend, (plan, _, refused) in choices.items():
        if found := plan or refused:
            plans[backend] = found
    try:
        chosen = better(plans, wanted_of(settings, job, 0).shared_rank, backends.missing)
    except NoPlanFits:
        return next(iter(choices.values()))
    return chosen, choices[chosen.backend][1], None


def _choose_with(
    settings: Settings, job: Job, model: Path, backend: Backend
) -> tuple[Plan | None, Planning, NoPlanFits | None]:
    """Return the plan with one backend."""
    refused: NoPlanFits | None = None
    first: Planning | None = None
    for blocks in block_choices(settings, job):
        of = f"the last {blocks} blocks" if blocks else "the model"
        what = f"measuring how this device trains {of} with {backend}: minutes the first time"
        with saying(what, after_s=SILENT_S):
            found = planning(settings, job, model, blocks, backend)
        first = first or found
        try:
            return found.best(), found, None
        except NoPlanFits as error:
            refused = refused or error
    assert first is not None, "there is a choice at least"
    return None, first, refused


def _as_dict(
    chosen: Plan | None,
    found: Planning,
    every: Sequence[Plan],
    reason: str,
    profile: DeviceProfile,
) -> dict[str, object]:
    return {
        "plan": chosen.as_dict() if chosen else None,
        "why": reason,
        "budget_mib": found.budget_mib,
        "floor_mib": found.calibration.floor_mib,
        "threads": found.threads,
        "candidates": [{**plan.as_dict(), "fits": fits(plan)} for plan in every],
        "accelerators": [
            {**accelerator.model_dump(), "here": line}
            for accelerator, line in zip(
                dict.fromkeys(profile.accelerators),
                on_accelerators(profile.accelerators),
                strict=False,
            )
        ],
    }


def _print(
    chosen: Plan | None,
    found: Planning,
    every: Sequence[Plan],
    reason: str,
    profile: DeviceProfile,
    *,
    explain: bool,
) -> None:
    console = Console(highlight=False, markup=False)
    floor_mib = found.calibration.floor_mib
    if chosen is not None:
        console.print(f"plan: {chosen}, {_threads(chosen.threads)}", soft_wrap=False)
        console.print(
            f"{floor_mib + chosen.predicted_mib:.0f} MiB predicted of {found.budget_mib:.0f}, "
            f"{floor_mib:.0f} of them before the model is loaded; "
            f"{chosen.predicted_tokens_s:.0f} tokens/s"
        )
    if explain:
        if every:
            console.print(_table(chosen, found, every))
        if chosen is not None:
            console.print(reason)
            if chosen.why_backend:
                console.print(f"Backend {chosen.backend}: {chosen.why_backend}.")
        for line in on_accelerators(profile.accelerators):
            console.print(line)


def _table(chosen: Plan | None, found: Planning, every: Sequence[Plan]) -> Table:
    """Return what there was to choose from; sizes are of the whole process."""
    floor_mib = found.calibration.floor_mib
    rows = max(1, found.wanted.training.tokens_per_step // every[0].seq_len)
    table = Table(title="Plans", title_justify="left", padding=(0, 1))
    for heading in ("", "rank", "held", "rows", "length", "way", "MiB", "tok/s", "fits"):
        right = heading not in ("", "way", "fits")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    told = alternatives(chosen, every, found.wanted.shared_rank)
    for plan in told:
        over_mib = plan.needs_mib - plan.budget_mib
        table.add_row(
            "→" if plan == chosen else "",
            str(plan.rank),
            str(plan.held),
            f"{plan.micro_batch}×{-(-rows // plan.micro_batch)}",
            str(plan.seq_len),
            _way(plan),
            f"{floor_mib + plan.predicted_mib:.0f}",
            f"{plan.predicted_tokens_s:.0f}",
            "yes" if fits(plan) else f"{max(1.0, over_mib):.0f} over",
            style="bold" if plan == chosen else None,
        )
    caption = (
        "rows: at a time × times a step; lean: without Adam's moments; MiB: predicted, of the "
        "whole process; over: what is missing, with a headroom"
    )
    if left := len(every) - len(told):
        caption += f"; {left} more plans of this length are left out (--json has them all)"
    table.caption = caption
    return table


def _way(plan: Plan) -> str:
    words = [plan.dtype]
    words += ["ckpt"] if plan.checkpointing else []
    words += ["lean"] if plan.optimizer == "adafactor" else []
    return " ".join(words)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
