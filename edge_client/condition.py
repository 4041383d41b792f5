"""`edge-client status`: what the agent wrote down, what its outbox holds, and both in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edge_client.errors import StorageError
from edge_client.outbox import FILE, Totals, look
from edge_client.report import is_running, read_told

BYTES_PER_MIB = 2**20
UNTOLD = "killed, or the power went: it left no word"


@dataclass(frozen=True, slots=True)
class Condition:
    """How a device is: what its agent wrote last, whether that still runs, what it has done."""

    told: Mapping[str, Any]
    running: bool
    totals: Totals
    problems: tuple[str, ...] = ()
    """What could not be read, in words."""

    @property
    def ended(self) -> str:
        """Why the last agent has ended; empty while one runs, or where there was none."""
        if self.running or not self.told:
            return ""
        return str(self.told.get("ended", {}).get("why", UNTOLD))

    def as_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.told.items() if k not in ("pid", "began", "ended")}
        return {
            **kept,
            "running": self.running,
            "ended": self.ended,
            "problems": list(self.problems),
            "updates": {"pending": self.totals.pending, "counted": self.totals.counted},
            "today": {"bytes": self.totals.bytes, "training_s": round(self.totals.training_s, 1)},
        }


def read_condition(state: Path, now: datetime) -> Condition:
    """Return how the device of a state folder is; no lock is needed, nor taken.

    Raises:
        StorageError: nobody has run with this folder, or it can't be read.
    """
    if not state.exists():
        raise StorageError(
            f"there is no folder {state}: no agent has run with its state there; start one with "
            "edge-client run, or name its folder with --state"
        )
    if not state.is_dir():
        raise StorageError(f"{state} is a file, not a state folder; name its folder with --state")
    totals = look(state, now.date().isoformat())
    told, problem = read_told(state)
    problems = [problem] if problem else []
    has_outbox = (state / FILE).exists()
    if told and not has_outbox:
        problems.append(
            f"{FILE} is not in {state}: updates that waited there are lost, and the device begins "
            "anew with the next start"
        )
    if not told and not problem and not has_outbox:
        raise StorageError(
            f"no agent has run with its state in {state}; start one with edge-client run, or name "
            "its folder with --state"
        )
    return Condition(told, is_running(told), totals, tuple(problems))


def in_words(condition: Condition) -> list[str]:
    """Return a device's condition as lines for its owner."""
    return [*_now(condition), *_learning(condition.told), *_costs(condition)]


def _now(condition: Condition) -> Iterator[str]:
    told = condition.told
    name, state = told.get("device", "this device"), told.get("state", "unknown")
    if condition.running:
        detail = told.get("detail")
        yield f"{name}: {state}" + (f" ({detail})" if detail else "")
    else:
        last = "" if state in ("unknown", "stopped") else f" (last: {state})"
        yield f"{name}: not running{last}"
    if condition.ended:
        at = told.get("ended", {}).get("time", told.get("time"))
        when = f" at {_clock(at)}" if at is not None else ""
        word = "ended" if "ended" in told else "last seen"
        yield f"{word:<9}{when}: {condition.ended}".replace("  at", " at")


def _learning(told: Mapping[str, Any]) -> Iterator[str]:
    if name := told.get("job", {}).get("name"):
        now = told.get("round", {})
        of = f" of {now['rounds']}" if now.get("rounds") else ""
        yield f"job       {name}" + (f", round {now['round']}{of}" if "round" in now else "")
    plan = {**told.get("plan", {}), **told.get("stepped-down", {})}
    if "plan" in plan:
        yield f"plan      {plan['plan']}"
        yield from _memory(plan)
        if why := plan.get("why"):
            yield f"smaller   than the first plan: {why}"
    rank = told.get("pruned", {}).get("rank_after", plan.get("rank"))
    if rank is not None:
        yield f"rank      {rank}"
    step = told.get("step", {})
    if {"step", "steps", "loss"} <= step.keys():
        yield f"training  step {step['step']} of {step['steps']}, loss {step['loss']:.3f}"
    if loss := told.get("evaluated", {}).get("loss"):
        yield f"held out  loss {loss:.3f} before this round's training"
    if reason := told.get("rejected", {}).get("reason"):
        yield f"refused   the last update that was: {reason}"


def _memory(plan: Mapping[str, Any]) -> Iterator[str]:
    """Say what the whole training process takes, where the file tells what its libraries do."""
    above_mib = plan.get("predicted_mib")
    if above_mib is None:
        return
    floor_mib = plan.get("floor_mib")
    if floor_mib is None:
        yield f"memory    {above_mib:.0f} MiB predicted beside what the libraries take"
    else:
        yield (
            f"memory    {floor_mib + above_mib:.0f} MiB predicted for the whole training process "
            f"({floor_mib:.0f} of them before the model is loaded)"
        )


def _costs(condition: Condition) -> Iterator[str]:
    totals = condition.totals
    yield f"updates   {totals.counted} counted, {totals.pending} on their way"
    yield (
        f"today     {totals.bytes / BYTES_PER_MIB:.1f} MiB, "
        f"{totals.training_s / 60:.1f} minutes of training"
    )
    for problem in condition.problems:
        yield f"note      {problem}"


def _clock(at: float) -> str:
    try:
        return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return "a time that is none"
