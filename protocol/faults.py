"""Named points at which a fault test has a process killed, as by a power cut.

`TUNEFLEET_FAULT=device.outbox.put:3` kills the process with SIGKILL when it passes that point for
the third time: no handler runs, nothing is flushed, nothing is closed. Unset, as everywhere but in
tests, a point is a call that returns at once. `python -m tests.faults` goes through all of them.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Mapping

VARIABLE = "TUNEFLEET_FAULT"

POINTS: Mapping[str, str] = {
    # The aggregator: starting
    "aggregator.start.written": "files of version 1 are written, not committed",
    "aggregator.start.committed": "version 1 is committed, nobody is connected",
    "aggregator.start.connected": "connected and subscribed, nothing said",
    "aggregator.start.said": "version, job and round are published",
    # ... a message from a device
    "aggregator.manifest.received": "a manifest is read and found good",
    "aggregator.manifest.expected": "the upload is expected, in a transaction",
    "aggregator.chunk.received": "a chunk is checked",
    "aggregator.chunk.inserted": "a chunk is in a transaction that is not committed",
    "aggregator.messages.handled": "what has come is dealt with, not committed",
    "aggregator.messages.committed": "what has come is committed, not acknowledged",
    "aggregator.messages.acked": "what has come is acknowledged, not answered",
    "aggregator.message.answered": "`need`, `done` or `reject` is published",
    # ... an upload that is complete
    "aggregator.upload.assembled": "all chunks are in and make the announced file",
    "aggregator.upload.verified": "its tensors are read and within bounds",
    "aggregator.upload.settling": "the upload is counted in a transaction that is not committed",
    "aggregator.upload.kept": "the upload is counted, its file has its final name",
    # ... a round
    "aggregator.merge.before": "the round is ready to be merged",
    "aggregator.merge.after": "the round is merged in memory",
    "aggregator.personal.written": "those beside the common adapter are written, not committed",
    "aggregator.version.written": "files of the new version are written, not committed",
    "aggregator.memory.written": "what a rule carries is written, not committed",
    "aggregator.round.settling": "version and round are in a transaction that is not committed",
    "aggregator.round.committed": "version and round are committed, nothing is published",
    "aggregator.version.publishing": "bands of a version are published, its manifest is not",
    "aggregator.personal.published": "one beside the common adapter is published, not yet that",
    "aggregator.version.published": "the version is published, the round is not",
    "aggregator.round.entered": "a round without a merge is committed, not published",
    "aggregator.round.announced": "the round is published",
    # Both: a file written durably
    "file.written": "a temporary file is written, not synced",
    "file.synced": "a temporary file is synced, not renamed",
    "file.renamed": "a file is renamed, its folder not synced",
    # The device
    "device.update.made": "a round is trained, its update is in memory",
    "device.outbox.putting": "the update is in a transaction that is not committed",
    "device.outbox.put": "the update is in the outbox, nothing is published",
    "device.manifest.offering": "the manifest is about to be published",
    "device.manifest.offered": "the broker has the manifest",
    "device.chunks.asked": "the aggregator has asked for chunks",
    "device.chunk.sending": "a chunk is about to be sent",
    "device.chunks.sent": "the broker has all chunks that were asked for",
    "device.outbox.dropping": "`done` or `reject` has come, the update is in the outbox",
    "device.outbox.dropped": "the update is gone from the outbox",
    "device.version.downloaded": "a version is complete, not checked as a whole",
    "device.version.checked": "a version is checked as a whole, not installed",
}
"""Name → what has just happened when a process passes the point."""


def chosen_point(setting: str) -> Callable[[str], None]:
    """Return what a process does at each point under a setting `name` or `name:nth`.

    Raises:
        SystemExit: there is no such point; says so.
    """
    if not setting:
        return lambda _: None
    chosen, _, number = setting.partition(":")
    if chosen not in POINTS or not (number or "1").isdecimal():
        raise SystemExit(f"error: {VARIABLE}={setting}: there is no such fault point")
    passings, nth = itertools.count(1), int(number or 1)

    def pass_point(name: str) -> None:
        if name == chosen and next(passings) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    return pass_point


fault_point = chosen_point(os.environ.get(VARIABLE, ""))
