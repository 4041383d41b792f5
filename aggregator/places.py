"""Where each adapter that the aggregator gives out is: in which folder, and on which topics.

global       the common version, for everybody
personal     a device's own adapter
trial        a second one for a device to try
candidate    one of a round's, for all to try: `who` is its number
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from protocol import topics
from protocol.messages import GlobalManifest

Kind = Literal["global", "personal", "trial", "candidate"]


class Place(NamedTuple):
    """Name one adapter of a job."""

    kind: Kind
    version: int
    who: str = ""
    """A device, or the number of a candidate; nobody, where it is the common one."""

    @property
    def folder(self) -> Path:
        """Return the folder of its bands, below that of the state."""
        if self.kind == "global":
            return Path("versions") / str(self.version)
        return Path("personal") / str(self.version) / self.kind / self.who

    def manifest_topic(self, job: str) -> str:
        return topics.topic(f"{self.kind}_manifest", job=job, **self._fields_of_topic)

    def chunk_topic(self, job: str, band: str, index: int) -> str:
        fields = self._fields_of_topic
        return topics.topic(f"{self.kind}_chunk", job=job, band=band, index=index, **fields)

    @property
    def _fields_of_topic(self) -> Mapping[str, object]:
        named = "number" if self.kind == "candidate" else "device"
        return {"version": self.version, named: self.who}

    def __str__(self) -> str:
        if self.kind == "global":
            return f"version {self.version}"
        return f"{self.kind} {self.who} of version {self.version}"


def common(version: int) -> Place:
    """Return the place of a common version."""
    return Place("global", version)


def beside(manifest: GlobalManifest) -> list[Place]:
    """Return the places of all that there is beside a common version, by its manifest."""
    version = manifest.version
    return [
        *(Place("personal", own, device) for device, own in manifest.personal.items()),
        *(Place("trial", version, device) for device in manifest.trials),
        *(Place("candidate", version, str(number)) for number in range(manifest.candidates)),
    ]
