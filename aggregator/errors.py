"""Errors of the aggregator.

TunefleetError                 anything a person is to read as one line (protocol.errors)
└── AggregatorError            the aggregator could not do what it was asked
    ├── MergeError             a round that cannot be merged, and whose update is to blame
    ├── EngineError            the cluster that is to work can't be used
    ├── UnknownRule            a merge rule that is neither built in nor installed
    ├── BadRuleSettings        a rule was given settings that it does not have
    ├── ConfigError            the job file or a flag is missing something or wrong
    ├── StoreError             the state folder can't be used
    │   └── ExportError        an export can't be written to where it is to be
    ├── PushError              an export can't be copied to where it is to go
    ├── JobInUse               a job is to be withdrawn, and devices are online in it
    ├── NoDaemon               a running aggregator was asked for something, and there is none
    ├── ControlRefused         a running aggregator was asked for something that it does not do
    ├── FolderError            a fleet's folder is missing, there already, or not in order
    └── EnrolmentRefused       somebody asked to be let in and may not; the reason is for them
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from protocol.errors import TunefleetError
from protocol.mistakes import did_you_mean, nearest


class AggregatorError(TunefleetError):
    """The aggregator could not do what it was asked."""


class MergeError(AggregatorError):
    """A round that cannot be merged.

    `device` and `module` say whose update is to blame and where; None where no single one is.
    """

    def __init__(self, why: str, *, device: str | None = None, module: str | None = None) -> None:
        where = [f"device {device}"] if device is not None else []
        where += [f"module {module}"] if module is not None else []
        super().__init__(f"cannot merge: {', '.join(where)}{': ' if where else ''}{why}")
        self.why = why
        self.device = device
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was made of, for it may come from another process."""
        return partial(MergeError, device=self.device, module=self.module), (self.why,)


class EngineError(AggregatorError):
    """The cluster that is to do the work can't be reached, or can't do it."""


class UnknownRule(AggregatorError):
    """A merge rule that is neither built in nor installed."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        hint = did_you_mean(nearest(name, self.known), self.known)
        super().__init__(f"there is no merge rule {name!r}; {hint}")


class BadRuleSettings(AggregatorError):
    """A merge rule was given a setting that it does not have, or a value that it cannot use."""


class ConfigError(AggregatorError):
    """The job file or a flag is missing something, or says something that can't be."""


class StoreError(AggregatorError):
    """The state folder can't be written, or belongs to another job."""


class ExportError(StoreError):
    """An export can't be written: the disk is full, or the folder may not be written to."""


class PushError(AggregatorError):
    """An export can't be copied to a hub or a URL."""


class JobInUse(AggregatorError):
    """A job is to be taken off a broker, and devices are online in it."""

    def __init__(self, job: str, broker: str, devices: Sequence[str]) -> None:
        super().__init__(
            f"devices are online in job {job!r} on {broker}: {', '.join(devices)}; end them first, "
            "or withdraw it all the same with --force"
        )
        self.broker = broker
        self.devices = tuple(devices)


class NoDaemon(AggregatorError):
    """A running aggregator was asked for something, and there is none, or it did not get to it."""


class ControlRefused(AggregatorError):
    """A running aggregator was asked for something that it does not do.

    `code` is for programs: "wrong" (no such command or value), "unknown" (no such version, device
    or job), "state" (not as things stand), "late" (the daemon got to it too late), "failed".
    """

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


class FolderError(AggregatorError):
    """A fleet's folder is missing, is there already, or is not in order."""


class EnrolmentRefused(AggregatorError):
    """Somebody asked to be let into the fleet and may not; the reason is for them to read."""
