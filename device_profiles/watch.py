"""What a person sees of a replay: a live table on a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from device_profiles.processes import Event
from device_profiles.tables import NOTABLE, LiveFleet, loss_table, plain_line


class Watch:
    """Show events as they come and the result at the end."""

    def __init__(self, *, as_json: bool, live: bool) -> None:
        self._as_json = as_json
        self._console = Console()
        self._fleet = LiveFleet()
        self._live = (
            Live(self._fleet, console=self._console, refresh_per_second=8)
            if live and not as_json
            else None
        )

    def __enter__(self) -> Watch:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def take(self, event: Event) -> None:
        """Show one event."""
        if self._as_json:
            print(json.dumps(event), flush=True)
        elif event["event"] == "scale":
            self._console.print(
                f"base model {event['model']}: {event['parameters'] / 1e6:.2f} M parameters; the "
                f"model-dependent part of each memory budget is divided by "
                f"{event['memory_scale']:.1f} (135 M / {event['parameters'] / 1e6:.2f} M)"
            )
        elif self._live is not None:
            self._fleet.update(event)
            if event["event"] in NOTABLE and (line := plain_line(event)):
                self._console.print(line, markup=False, highlight=False)
        elif line := plain_line(event):
            print(line, flush=True)

    def finish(self, summary: dict[str, Any], folder: Path) -> None:
        """Show the result and say where everything is."""
        if self._as_json:
            print(json.dumps({"event": "summary", **summary}), flush=True)
            return
        self._console.print(loss_table(summary))
        self._console.print(
            f"in {summary['wall_s']:.0f} s; {folder}/report.html shows it, {folder}/summary.json "
            f"has the figures, {folder}/adapter is the PEFT adapter"
        )
