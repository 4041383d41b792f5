"""Which jobs a broker shows, and which of them a device may take."""

from __future__ import annotations

from contextlib import suppress

from protocol import topics
from protocol.errors import BadSignature, ProtocolError
from protocol.messages import Job, Round
from protocol.signing import open_message
from protocol.transport import Incoming


class ShownJobs:
    """Note jobs and rounds as they are shown; `trusted` is the key of the device's aggregator.

    Without one (None) any job will do, whoever signed it.
    """

    def __init__(self, trusted: str | None) -> None:
        self._trusted = trusted
        self._states: dict[str, str] = {}
        """Job → its round's state, empty while that is not known."""
        self._others: set[str] = set()
        """Jobs of aggregators that this device does not trust."""

    @property
    def unfinished(self) -> list[str]:
        """Jobs that are not known to be finished: of one without a round nobody knows."""
        return sorted(j for j, s in self._states.items() if s != "finished")

    @property
    def finished(self) -> list[str]:
        return sorted(j for j, s in self._states.items() if s == "finished")

    @property
    def others(self) -> list[str]:
        """Jobs of aggregators that this device does not trust."""
        return sorted(self._others)

    @property
    def every(self) -> list[str]:
        return sorted({*self._states, *self._others})

    def note(self, incoming: Incoming) -> None:
        """Take in a message, if it shows a job or a round."""
        with suppress(ProtocolError):
            found = topics.match(incoming.topic)
            job = found.fields["job"]
            if found.kind == "job":
                self._note_job(job, incoming)
            elif found.kind == "round" and incoming.payload:
                self._note_round(job, incoming)

    def _note_job(self, job: str, incoming: Incoming) -> None:
        if not incoming.payload:  # it is cleared
            self._states.pop(job, None)
            self._others.discard(job)
        elif self._is_foreign(incoming):
            self._states.pop(job, None)
            self._others.add(job)
        else:
            self._others.discard(job)
            self._states.setdefault(job, "")

    def _note_round(self, job: str, incoming: Incoming) -> None:
        if self._trusted is None:
            self._states.setdefault(job, "")
        now, _ = open_message(incoming.payload, incoming.topic, Round, trusted=self._trusted)
        if job not in self._others:
            self._states[job] = now.state

    def _is_foreign(self, incoming: Incoming) -> bool:
        if self._trusted is None:
            return False
        try:
            open_message(incoming.payload, incoming.topic, Job, trusted=self._trusted)
        except BadSignature:
            return True
        except ProtocolError:
            return False  # the right key, but malformed: who takes part in it says how
        return False
