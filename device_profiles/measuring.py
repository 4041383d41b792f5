"""What a replay's adapters are worth: loaded by PEFT as anybody would, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import psutil

from device_profiles.fleet import Fleet
from device_profiles.processes import Event

if TYPE_CHECKING:
    from device_profiles.replay import Options

SAMPLE_ROWS = 2
"""Rows of each text on which adapters are compared across the fleet."""
AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """Hold held-out losses, in nats a token.

    By device, on its own text: `merged` of the common adapter, `personal` of its own, where it has
    one. `across` has the mean over the whole fleet's text, on a sample, of the base, of adapters
    trained alone (`local`), of the common one (`merged`) and of the devices' own (`personal`; where
    a device has none, the common one).
    """

    merged: dict[str, float]
    personal: dict[str, float]
    across: dict[str, float]


def measure(
    fleet: Fleet,
    options: Options,
    own: Sequence[str],
    max_tokens: int,
    on_event: Callable[[Event], None],
    ask: Callable[[list[str]], str],
) -> Measured:
    """Measure what a finished replay has left in its folder.

    `own` are the devices that end with an adapter of their own; `ask` has an `edge-client` command
    answer.
    """
    from aggregator.export import export_adapter

    shared = options.out / "adapter"
    export_adapter(options.out / "aggregator", shared)
    first = {device.name: str(device.data[0]) for device in fleet.devices}
    texts = sorted(set(first.values()))
    folders = {device.name: options.out / "devices" / device.name for device in fleet.devices}
    alone = [folder / "alone" for folder in folders.values()] if options.compare_alone else []
    personal = {name: folders[name] / "adapter" for name in own}
    adapters = [shared, *alone, *personal.values()]
    on_event({"event": "measuring", "adapters": len(adapters), "texts": len(texts)})
    common = ["evaluate", "--model", fleet.model, "--seed", str(options.seed)]
    common += ["--max-tokens", str(max_tokens)]

    def question(data: Sequence[str], of: Sequence[Path], *more: str) -> list[str]:
        paths = [word for path in data for word in ("--data", path)]
        return [*common, *paths, *(w for path in of for w in ("--adapter", str(path))), *more]

    answers = _answers(
        [
            question(texts, [shared]),
            question(texts, adapters, "--max-rows", str(SAMPLE_ROWS)),
            *(question([first[name]], [path]) for name, path in personal.items()),
        ],
        ask,
    )
    whole, sampled = answers[:2]
    means = {name: fmean(row.values()) for name, row in sampled.items()}
    across = {"base": means["base"], "merged": means[str(shared)]}
    if alone:
        across["local"] = fmean(means[str(path)] for path in alone)
    if personal:
        ends = [personal.get(name, shared) for name in first]
        across["personal"] = fmean(means[str(path)] for path in ends)
    return Measured(
        {name: whole[str(shared)][path] for name, path in first.items()},
        {
            name: row[str(path)][first[name]]
            for (name, path), row in zip(personal.items(), answers[2:], strict=True)
        },
        across,
    )


def _answers(
    questions: Sequence[list[str]], ask: Callable[[list[str]], str]
) -> list[dict[str, dict[str, float]]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return [json.loads(answer) for answer in pool.map(ask, questions)]
        except BaseException:  # a signal: the pool would wait for the answers, minutes perhaps
            pool.shutdown(wait=False, cancel_futures=True)
            for process in psutil.Process().children():
                process.kill()
            raise
