"""What a replay shows on a terminal: the live fleet, plain lines elsewhere, the table at the end.

Events are dicts with an "event" and, but for the aggregator's own, a "device":

    mixed      onnx (names of the devices that train with it); the others train with torch
    serving    rounds                  the job is open; from the aggregator
    plan       rank, profile
    state      state (short text)
    round      round, rounds           a device begins a round; rounds count from 1
    step       round, step, steps, loss (training nats per token)
    bytes      up, down                totals since the start, in bytes
    pruned     rank_before, rank_after
    evaluated  loss (held-out nats per token), adapter (of which, in words)
    not-tried  adapter, reason         one that it was given to try
    alone      step, steps, loss       training without the fleet, after the last round
    merged     round, seconds, devices (how many); from the aggregator
    warning    round, reason           of a merge; from the aggregator
    idle-setting  reason               a setting that does nothing; from the aggregator
    measuring  adapters, texts (how many of each); the replay's last work

Other events, and fields that are missing, are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from rich import box
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from device_profiles.summary import DeviceSummary, Losses, Summary, mean, rank_path, read_summary
from protocol.human import human_bytes, human_seconds

Event = Mapping[str, Any]

ALONE = "training alone, to compare"
LOSS_WIDTH = 5
"""A loss is never cut short; on a narrow terminal other columns are."""
NONE = "\N{EN DASH}"
"""Stands where a figure was not measured."""


def loss_table(summary: Summary | Mapping[str, Any]) -> Table:
    """Return the table that ends a replay: one row a device and the mean, the best loss bold."""
    fleet = read_summary(summary)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("device", no_wrap=True)
    personal = fleet.is_personal
    # A terminal of 80 characters has to show another column of losses, or backends, instead.
    profile = not personal and not fleet.has_onnx
    if profile:
        table.add_column("profile", style="dim", overflow="ellipsis")
    if fleet.has_onnx:
        table.add_column("with", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("predicted /\npeak MiB", justify="right", no_wrap=True)
    for heading in ("up", "down"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("base", "local", "merged", *(["own"] if personal else [])):
        table.add_column(heading, justify="right", no_wrap=True, min_width=LOSS_WIDTH)
    for device in fleet.devices:
        cells = _device_cells(device, profile, fleet.has_onnx)
        table.add_row(*cells, *_loss_cells(device.loss, personal))
    table.add_section()
    up, down = _totals(fleet)
    average = mean(d.rank_end for d in fleet.devices)
    rank = NONE if average is None else f"{average:.3g}"
    blank = [""] * (profile or fleet.has_onnx)
    table.add_row(
        Text("mean / total", "italic"),
        *blank,
        *(rank, "", up, down),
        *_loss_cells(fleet.mean_loss, personal),
    )
    if fleet.across.merged is not None:
        blank += [""] * 4
        cells = _loss_cells(fleet.across, personal)
        table.add_row(Text("on all text", "italic"), *blank, *cells)
    return table


def _device_cells(device: DeviceSummary, profile: bool, backend: bool) -> list[Text]:
    predicted, peak = _number(device.predicted_mib, ".0f"), _number(device.peak_mib, ".0f")
    missed = device.memory_as_predicted is False
    memory = Text.assemble((f"{predicted} / ", "dim"), (peak, "yellow" if missed else ""))
    return [
        Text(device.name),
        *([Text(device.profile)] if profile else []),
        *([Text(device.backend)] if backend else []),
        Text(rank_path(device)),
        memory,
        Text(human_bytes(device.bytes_up)),
        Text(human_bytes(device.bytes_down)),
    ]


def _loss_cells(loss: Losses, personal: bool) -> list[Text]:
    values = (loss.base, loss.local, loss.merged, *([loss.personal] if personal else []))
    best = min((value for value in values if value is not None), default=None)
    return [
        Text(_number(value, ".3f"), "bold" if value is not None and value == best else "")
        for value in values
    ]


def _totals(fleet: Summary) -> tuple[str, str]:
    return (
        human_bytes(sum(d.bytes_up for d in fleet.devices)),
        human_bytes(sum(d.bytes_down for d in fleet.devices)),
    )


def _number(value: Any, form: str = "") -> str:
    return format(value, form) if isinstance(value, int | float) else NONE


@dataclass(slots=True)
class _Row:
    """Hold what is known of one device while it runs."""

    profile: str = ""
    rank: int | None = None
    round: int | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    held_out: bool = False
    """Whether `loss` is held-out; otherwise it is the training loss of the last step."""
    alone: bool = False
    """Whether `step` counts training alone; otherwise it counts the round's."""
    bytes_up: int = 0
    bytes_down: int = 0
    state: str = ""


class LiveFleet:
    """Show a running fleet as one table that `rich.live.Live` can redraw at any time.

    `update` and the drawing may come from different threads.
    """

    def __init__(self, rounds: int | None = None) -> None:
        """Begin with no device; `rounds` is how many are to come, if already known."""
        self._rows: dict[str, _Row] = {}
        self._rounds = rounds
        self._merged = 0
        self._last_merge = ""
        self._measuring = ""
        self._lock = Lock()

    def update(self, event: Event) -> None:
        """Take in one event; an unknown one changes nothing."""
        kind = event.get("event")
        with self._lock:
            if kind == "merged":
                self._merged = max(self._merged, event.get("round", self._merged))
                self._last_merge = _merge_text(event)
            elif kind == "measuring":
                self._measuring = _measuring_text(event)
            elif kind in _DEVICE_EVENTS and "device" in event:
                row = self._rows.setdefault(str(event["device"]), _Row())
                _take(row, event)
                if kind == "round":
                    self._rounds = event.get("rounds", self._rounds)

    def __rich__(self) -> Group:
        """Return the progress line of what the fleet is at above the table of the devices."""
        with self._lock:
            return Group(self._progress(), self._table())

    def _progress(self) -> Table:
        line = Table.grid(padding=(0, 2))
        title, done, total = self._work()
        bar = ProgressBar(total=total, completed=done, width=32)
        line.add_row(Text(title, "bold"), bar, Text(self._last_merge, "dim"))
        return line

    def _work(self) -> tuple[str, float, float | None]:
        """Return what is going on, how much of it is done, and of how much (None: not known)."""
        if self._measuring:
            return self._measuring, 0, None
        rows = self._rows.values()
        if any(row.alone for row in rows):
            done = sum(row.step / row.steps for row in rows if row.alone and row.steps)
            return ALONE, done, len(rows)
        current = max([self._merged, *(row.round or 0 for row in rows)])
        total = self._rounds or max(self._merged, 1)
        done = min(self._merged + self._share_of_round(), total)
        return f"round {current} of {self._rounds or NONE}", done, total

    def _share_of_round(self) -> float:
        """Return how much of the round after the last merge is trained, 0 to 1."""
        present = [row for row in self._rows.values() if row.round == self._merged + 1]
        return mean(row.step / row.steps if row.steps else 0.0 for row in present) or 0.0

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("device", no_wrap=True)
        table.add_column("profile", style="dim", overflow="ellipsis", no_wrap=True)
        for heading in ("rank", "round"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("step", no_wrap=True)
        for heading in ("loss", "up", "down"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("state", overflow="ellipsis", no_wrap=True)
        for name, row in self._rows.items():
            table.add_row(Text(name), *_live_cells(row))
        return table


_DEVICE_EVENTS = frozenset(
    {"plan", "state", "round", "step", "bytes", "pruned", "evaluated", "alone"}
)


def _take(row: _Row, event: Event) -> None:
    """Write what a device's event says into its row."""
    match event["event"]:
        case "plan":
            row.rank, row.profile = event.get("rank"), str(event.get("profile", ""))
        case "state":
            row.state = str(event.get("state", ""))
        case "round":
            row.round, row.step, row.alone = event.get("round"), 0, False
        case "step" | "alone" as kind:
            row.round, row.alone = event.get("round", row.round), kind == "alone"
            row.step, row.steps = event.get("step", row.step), event.get("steps", row.steps)
            row.loss, row.held_out = event.get("loss"), False
        case "bytes":
            row.bytes_up = event.get("up", row.bytes_up)
            row.bytes_down = event.get("down", row.bytes_down)
        case "pruned":
            row.rank = event.get("rank_after", row.rank)
        case "evaluated":
            row.loss, row.held_out = event.get("loss"), True


def _live_cells(row: _Row) -> list[Text | Table]:
    step = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(row.steps, 1), completed=row.step, width=8)
    count = f"{row.step}/{row.steps}" if row.steps else ""
    step.add_row(bar, Text(count, "dim"))
    return [
        Text(row.profile),
        Text(_number(row.rank)),
        Text(_number(row.round)),
        step,
        Text(_number(row.loss, ".3f"), "bold" if row.held_out else ""),
        Text(human_bytes(row.bytes_up)),
        Text(human_bytes(row.bytes_down)),
        Text(row.state),
    ]


def _merge_text(event: Event) -> str:
    count, seconds = event.get("devices"), event.get("seconds")
    devices = f"{count} {'device' if count == 1 else 'devices'}"
    took = f" in {human_seconds(seconds)}" if isinstance(seconds, int | float) else ""
    return f"merged {devices}{took}"


def _measuring_text(event: Event) -> str:
    adapters, texts = _number(event.get("adapters")), _number(event.get("texts"))
    return f"measuring {adapters} adapters on {texts} texts"


NOTABLE = frozenset({"warning", "held", "rejected", "refused", "quarantined", "idle-setting"})
"""Events that are told as a line beside the live view, which has no place for them."""


def plain_line(event: Event) -> str | None:
    """Return the line that tells an event where there is no terminal, or None if it needs none.

    Told are plans, the last step of each round, cuts of rank, held-out losses and merges, and what
    went wrong; what takes long besides (planning, training alone, measuring) when it begins or now
    and then.
    """
    device = event.get("device", "")
    loss = _number(event.get("loss"), ".3f")
    match event.get("event"):
        case "serving":
            rounds = _number(event.get("rounds"))
            return f"{rounds} rounds; devices plan: the first time they measure, for a minute or so"
        case "mixed":
            return f"ONNX Runtime trains {', '.join(event['onnx']) or 'no device: it fits none'}"
        case "plan":
            backend = f", {event['backend']}" if event.get("backend") else ""
            rank = _number(event.get("rank"))
            return f"{device}: rank {rank}, profile {event.get('profile')}{backend}"
        case "step" if "step" in event and event["step"] == event.get("steps"):
            number, steps = _number(event.get("round")), _number(event.get("steps"))
            return f"{device}: round {number} trained, {steps} steps, training loss {loss}"
        case "alone" if _worth_a_line(event):
            return f"{device}: {ALONE}, step {event['step']} of {event['steps']}, loss {loss}"
        case "measuring":
            return _measuring_text(event)
        case "pruned":
            before, after = _number(event.get("rank_before")), _number(event.get("rank_after"))
            return f"{device}: rank cut {before} → {after}"
        case "evaluated":
            adapter = event.get("adapter")
            return f"{device}: held-out loss {loss}" + (f" with {adapter}" if adapter else "")
        case "not-tried":
            return f"{device}: did not try {event.get('adapter')}: {event.get('reason')}"
        case "merged":
            return f"round {_number(event.get('round'))}: {_merge_text(event)}"
        case "warning" | "held":
            return f"round {_number(event.get('round'))}: {event.get('reason')}"
        case "rejected" if event.get("process") != device:  # the device says it too
            number = _number(event.get("round"))
            return f"round {number}: the update of {device} was refused: {event.get('reason')}"
        case "refused":
            return f"{event.get('process')}: a message was refused: {event.get('reason')}"
        case "quarantined":
            return f"{device}: nothing more is taken from it for a while, too much was refused"
        case "idle-setting":
            return f"note: {event.get('reason')}"
    return None


def _worth_a_line(event: Event) -> bool:
    """Tell of a step whether it is the first, the last, or ends a quarter."""
    step, steps = event.get("step"), event.get("steps")
    if not isinstance(step, int) or not isinstance(steps, int):
        return False
    return step in (1, steps) or step * 4 // steps > (step - 1) * 4 // steps
