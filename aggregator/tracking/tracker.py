"""The threads that tell each sink of the rounds that have ended."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from aggregator.errors import ConfigError
from aggregator.tracking.base import Run, Sink, values_of
from aggregator.tracking.lines import LinesSink
from aggregator.tracking.mlflow import MlflowSink
from aggregator.tracking.tensorboard import TensorBoardSink
from aggregator.tracking.wandb import WandbSink
from aggregator.view import RoundView, StateView
from protocol.events import EventLog
from protocol.extras import how_to_install
from protocol.files import write_durably

ALWAYS = "jsonl"
SINKS: Mapping[str, Callable[[Run], Sink]] = {
    ALWAYS: LinesSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""Sink → the module that it needs; its extra is called as the sink."""
DONE = "last-round"
EVERY_S = 2.0
AT_ONCE = 200


def check_sinks(names: Sequence[str]) -> tuple[str, ...]:
    """Return the sinks that are asked for, with the one that is always there.

    Raises:
        ConfigError: there is no such sink, or its package is not installed.
    """
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"there is no tracking sink {name!r}; there are {', '.join(SINKS)}")
        module = PACKAGES.get(name)
        if module is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(f"tracking with {name} needs an extra; {how_to_install(name)}")
    return tuple(dict.fromkeys((ALWAYS, *names)))


class Tracker:
    """Track one job's rounds for as long as the block lasts."""

    def __init__(
        self,
        state: Path,
        sinks: Sequence[str],
        events: EventLog,
        options: Mapping[str, Mapping[str, str]] | None = None,
        *,
        folder: Path | None = None,
        every_s: float = EVERY_S,
    ) -> None:
        """Prepare to track; the store is there by now.

        Raises:
            ConfigError: see `check_sinks`.
        """
        self._folder = folder or state / "tracking"
        self._state, self._events, self._every_s = state, events, every_s
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(name, (options or {}).get(name, {})),
                name=f"tracking-{name}",
                daemon=True,
            )
            for name in check_sinks(sinks)
        ]

    def __enter__(self) -> Tracker:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        """Have each sink write what is left; one that hangs is left behind."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def _run(self, name: str, options: Mapping[str, str]) -> None:
        try:
            self._track(name, options)
        except Exception as error:  # the top of a thread, and what a tracker raises is its own
            why = " ".join(f"{type(error).__name__}: {error}".split())
            self._events.emit("tracking-failed", sink=name, reason=why[:400])

    def _settings(self, view: StateView) -> dict[str, Any] | None:
        """Return the job's settings once it is served; None if it ends before."""
        while not view.is_bound:
            if self._stop.wait(self._every_s):
                return None
        return view.settings()

    def _track(self, name: str, options: Mapping[str, str]) -> None:
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with StateView(self._state) as view:
            settings = self._settings(view)
            if settings is None:
                return
            sink = SINKS[name](Run(settings["job"], settings, folder, options))
            try:
                last = _read_done(folder)
                is_last = False
                while not is_last:
                    is_last = self._stop.wait(self._every_s)
                    for ended in ended_after(view, last):
                        sink.log(ended.number, values_of(ended))
                        last = ended.number
                        write_durably(folder / DONE, str(last).encode())
            finally:
                sink.close()


def ended_after(view: StateView, last: int) -> list[RoundView]:
    """Return the rounds after a number that have ended, ascending; not all at once if many."""
    newest = view.round_state().number
    before = min(newest, last + AT_ONCE) + 1
    found = view.rounds(before=before, limit=max(1, before - 1 - last))
    return [one for one in reversed(found) if one.number > last and one.ended is not None]


def _read_done(folder: Path) -> int:
    """Return the last round that a sink was told of."""
    try:
        return int((folder / DONE).read_text())
    except (OSError, ValueError):
        return 0
