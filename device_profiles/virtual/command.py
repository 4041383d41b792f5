"""`fleet-replay run TRACES`, `again` and `compare`: what they print, and where all of it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aggregator.engine import Engine, Name, open_engine
from aggregator.export import export_adapter
from device_profiles.errors import ReplayError
from device_profiles.replay import name_latest, run_folder
from device_profiles.virtual.compare import Run, same_result, table, write_picture
from device_profiles.virtual.options import Options, again, prepare, read_record
from device_profiles.virtual.pool import Pool
from device_profiles.virtual.run import RESULT, Staging, replay_traces
from edge_client.calibrate import cache_folder
from protocol.cli import Interrupted
from protocol.errors import TunefleetError
from protocol.human import human_bytes, human_seconds

SHOWN = ("aggregator.round", "aggregator.merged", "killed", "ended", "aggregator.rejected")
"""Events that a person sees; all are in events.jsonl."""


class Teller:
    """Print events and results, for people or as JSON Lines."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console()

    def say(self, what: str) -> None:
        """Tell what is being done."""
        if self._as_json:
            print(json.dumps({"event": "preparing", "what": what}), flush=True)
        else:
            self._console.print(what, markup=False)

    def take(self, event: Mapping[str, Any]) -> None:
        """Show an event, if it is one to be shown."""
        if self._as_json:
            print(json.dumps(event, default=str), flush=True)
        elif event["event"] in SHOWN:
            self._console.print(_line(event), markup=False, highlight=False)

    def result(self, result: Mapping[str, Any], folder: Path) -> None:
        """Show what a replay came to."""
        if self._as_json:
            print(json.dumps({"event": "result", **result}), flush=True)
            return
        shown = Table(
            "round", "merged at", "counted", "late", "mean rank", "bytes", "begun with", "loss"
        )
        for each in result["rounds"]:
            merged = each["merged_s"]
            shown.add_row(
                str(each["round"]),
                "–" if merged is None else human_seconds(merged),
                str(each["counted"]),
                str(each["late"]),
                "–" if each["ranks"] is None else f"{each['ranks']:.2f}",
                human_bytes(each["bytes"]),
                *("–" if x is None else f"{x:.4f}" for x in (each["loss"], each["version_loss"])),
            )
        self._console.print(shown)
        self._console.print(
            f"{result['ended']} after {human_seconds(result['virtual_s'])} of virtual time, in "
            f"{human_seconds(result['wall_s'])}; {folder} has the log (events.jsonl), the figures "
            "(result.json) and the PEFT adapter (adapter)",
            markup=False,
        )


def run_traces(options: Options, out: Path, *, as_json: bool) -> None:
    """Replay traces, and leave a run's folder.

    Raises:
        ReplayError: it can't be carried out, or the job was not finished by its end.
        EngineError: what is to train and merge can't be used.
    """
    teller = Teller(as_json=as_json)
    with open_engine(options.engine) as engine, run_folder(out) as folder:
        staging, pool, _ = prepare(options, folder, cache_folder(), teller.say)
        result = _replay(staging, pool, folder, teller, engine)
    teller.result(result, name_latest(folder))
    if result["state"] != "finished":
        raise ReplayError(
            f"the job was not finished: {result['ended']} in round {len(result['rounds'])}; "
            f"`fleet-replay again {folder}` repeats it"
        )


def run_again(run: Path, out: Path, *, as_json: bool, name: Name | None = None) -> bool:
    """Replay a run from its log; say, and return, whether it came to the same.

    `name` is of the engine, where it is to be another one than then.

    Raises:
        ReplayError: it can't be carried out.
        EngineError: what is to train and merge can't be used.
    """
    teller = Teller(as_json=as_json)
    before = Run(run) if (run / RESULT).exists() else None
    name = name or read_record(run).options.get("engine", "plain")
    with open_engine(name) as engine, run_folder(out) as folder:
        staging, pool, _, doubts = again(run, folder, cache_folder(), teller.say, name)
        for doubt in doubts:
            teller.say(f"not as it was: {doubt}")
        result = _replay(staging, pool, folder, teller, engine)
    teller.result(result, folder)
    if before is None:
        teller.say(f"{run} had come to no result: there is nothing to compare this one with")
        return True
    same, how = same_result(before, Run(folder))
    teller.say(how if same else f"not the same as {run}: {how}")
    return same


def run_compare(one: Path, other: Path, picture: Path | None) -> None:
    """Print two runs side by side, and draw them.

    Raises:
        ReplayError: one can't be read, or the picture can't be written.
    """
    runs = Run(one), Run(other)
    console = Console()
    names = [run.resolve().name for run in (one, other)]
    if names[0] == names[1]:
        names = [str(one), str(other)]
    shown = Table("", *(escape(name) for name in names))
    for column in shown.columns:
        column.overflow = "fold"  # what is cut off might be where the two differ
    for row in table(*runs):
        shown.add_row(*(escape(cell) for cell in row))
    console.print(shown)
    same, how = same_result(*runs)
    console.print(how if same else f"not the same: {how}", markup=False)
    path = picture or other / "compare.html"
    write_picture(*runs, path)
    console.print(f"the picture is {path}", markup=False)


def _replay(
    staging: Staging, pool: Pool | None, folder: Path, teller: Teller, engine: Engine
) -> dict[str, Any]:
    """Replay, and export the adapter.

    Raises:
        ReplayError: it was not carried out; says how to repeat it.
    """
    try:
        result = replay_traces(staging, folder, pool, teller.take, engine=engine)
    except TunefleetError as error:
        raise ReplayError(f"{error}; `fleet-replay again {folder}` repeats it") from None
    except Interrupted:
        teller.say(f"`fleet-replay again {folder}` replays it from its start")
        raise
    export_adapter(folder / "aggregator", folder / "adapter")
    return result


def _line(event: Mapping[str, Any]) -> str:
    at = human_seconds(event["time"])
    kind = str(event["event"]).removeprefix("aggregator.")
    if kind == "merged":
        return f"{at:>14}  round {event['round']} merged: {event['devices']} updates"
    if kind == "round":
        return f"{at:>14}  round {event['round']} is {event['state']}"
    why = event.get("why") or event.get("reason") or ""
    return f"{at:>14}  {event['device']}: {kind} {why}".rstrip()
