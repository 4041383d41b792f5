"""How the daemon tells what it does: for people on a terminal, for the journal as JSON Lines.

Events, their names and fields are `protocol.events`'; here they get a level, and structlog renders
them. A line of JSON has what it always had, and `level`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog

from protocol.events import EventLog, shown

Format = Literal["console", "plain", "json"]
LEVELS = ("debug", "info", "warning", "error")
_LEVEL_OF: Mapping[str, str] = {
    "command-refused": "warning",
    "flooding": "warning",
    "held": "error",
    "full": "error",
    "idle-setting": "warning",
    "quarantined": "warning",
    "refused": "warning",
    "rejected": "warning",
    "reload-refused": "error",
    "restart-needed": "warning",
    "swept": "warning",
    "tracking-failed": "warning",
    "undelivered": "warning",
    "waiting": "warning",
    "warning": "warning",
}
"""Events of another level than info."""


def chosen_format(wanted: str, stream: TextIO, environ: Mapping[str, str]) -> Format:
    """Return how to tell: as is wanted, or by who listens."""
    if wanted in ("console", "plain", "json"):
        return wanted  # type: ignore[return-value]  # it is one of them
    if stream.isatty():
        return "console"
    return "json" if _is_under_systemd(stream, environ) else "plain"


def _is_under_systemd(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Say whether a stream goes to the journal, or this is the main process of a service.

    A terminal's shell may have inherited the journal's variable from a service: it names the file
    by device and inode, so that one can tell (systemd.exec(5)).
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    if environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
        return True
    return bool(environ.get("INVOCATION_ID") and environ.get("NOTIFY_SOCKET"))


class _Lines:
    """Where structlog's rendered lines go."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self.msg = self.debug = self.info = self.warning = self.error = take


class StructuredLog(EventLog):
    """An event log that structlog renders, from a level on."""

    def __init__(
        self,
        form: Format,
        *,
        level: str = "info",
        stream: TextIO | None = None,
        also: Callable[[Mapping[str, Any]], None] | None = None,
        **always: object,
    ) -> None:
        super().__init__(as_json=form == "json", stream=stream, also=also, **always)
        self._form: Format = form
        self._parts: list[StructuredLog] = []
        self._processors = [structlog.processors.add_log_level, _renderer(form)]
        self.level = level

    def part(self, **always: object) -> StructuredLog:
        """Return a log to the same stream, whose events have these fields too."""
        own = StructuredLog(
            self._form, level=self._level, stream=self._stream, also=self._also, **always
        )
        self._parts.append(own)
        return own

    @property
    def level(self) -> str:
        return self._level

    @level.setter
    def level(self, level: str) -> None:
        """Tell what is at least of this level from now on."""
        self._level = level
        for part in self._parts:
            part.level = level
        self._logger: Any = structlog.wrap_logger(
            _Lines(self._take),
            processors=self._processors,
            wrapper_class=structlog.make_filtering_bound_logger(level),
            cache_logger_on_first_use=True,
        )

    def _say(self, record: Mapping[str, Any]) -> None:
        fields = dict(record)
        event = fields.pop("event")
        getattr(self._logger, _LEVEL_OF.get(event, "info"))(event, **fields)


def _renderer(form: Format) -> structlog.types.Processor:
    if form == "json":
        return _json
    if form == "plain":
        return _plain
    console = structlog.dev.ConsoleRenderer(
        colors=True, pad_event_to=14, sort_keys=False, timestamp_key="time"
    )

    def render(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
        told = {k: v if k in ("event", "level") else shown(v) for k, v in event.items()}
        told["time"] = EventLog.clock(event["time"])
        return str(console(logger, name, told))

    return render


def _json(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """Render as the plain event log does: `event` and `time` first."""
    first = {"event": event.pop("event"), "time": event.pop("time"), "level": event.pop("level")}
    rendered = structlog.processors.JSONRenderer()(logger, name, {**first, **event})
    return rendered if isinstance(rendered, str) else rendered.decode()


def _plain(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    return EventLog.in_words({k: v for k, v in event.items() if k != "level"})


def open_log(form: str, level: str) -> StructuredLog:
    """Return the daemon's log on its standard output."""
    return StructuredLog(chosen_format(form, sys.stdout, os.environ), level=level)
