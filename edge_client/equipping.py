"""From a job to what a device learns it with: what that takes is fetched first.

A model comes from a hub (`hub.py`), an artifact set from the job (`artifacts.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edge_client.artifacts import ArtifactFetch
from edge_client.config import Settings
from edge_client.errors import ArtifactWanted, ModelError, ModelWanted
from edge_client.hub import ModelDownload
from edge_client.policy.decide import Activity
from edge_client.prepare import Equip, Equipment
from protocol.events import EventLog
from protocol.link import DeviceLink, Incoming
from protocol.messages import Job
from protocol.patience import Waiting
from protocol.topics import Match

PATIENCE_TICKS = 20
"""For how long a broker may take to show an artifact set, in the agent's ticks."""


class Equipping:
    """Equip a device for one job; `used` hears of bytes that do not come over its link."""

    def __init__(
        self,
        settings: Settings,
        equip: Equip,
        events: EventLog,
        waiting: Waiting,
        used: Callable[[int], None],
    ) -> None:
        self._settings, self._equip = settings, equip
        self._events, self._waiting, self._used = events, waiting, used
        self._download: ModelDownload | None = None
        self._fetch: ArtifactFetch | None = None
        self._ticks = 0

    @property
    def needs(self) -> Activity:
        """What it has to be allowed to do now."""
        under_way = [one for one in (self._fetch, self._download) if one is not None]
        return "transfer" if any(one.folder is None for one in under_way) else "train"

    def pause(self) -> None:
        """Download nothing until `equipment` is asked for again."""
        if self._download is not None:
            self._download.stop()

    def equipment(
        self, job: Job, link: DeviceLink, may_transfer: Callable[[], bool]
    ) -> Equipment | None:
        """Return what the device learns a job with; None: ask again, it is being fetched.

        Raises:
            EdgeError: the device can't learn this job; says why.
        """
        if self._download is not None:
            return self._downloaded(self._download, job)
        if self._fetch is None:
            try:
                return self._equip(self._settings, job)
            except ModelWanted as wanted:
                self._download = ModelDownload(
                    wanted.name, self._settings.state, self._events, self._used
                )
                return None
            except ArtifactWanted:
                self._fetch = ArtifactFetch(job, self._settings, link, self._events, may_transfer)
            self._fetch.begin()
        elif self._fetch.folder is not None:
            return self._equip(replace(self._settings, onnx=self._fetch.folder), job)
        elif self._fetch.manifest is not None:
            self._fetch.go_on()
        else:
            self._wait(job)
        return None

    def _downloaded(self, download: ModelDownload, job: Job) -> Equipment | None:
        """Go on with the model's download; return the equipment with it once it is here."""
        settings = self._settings
        if download.folder is not None:
            return self._equip(replace(settings, model=str(download.folder)), job)
        try:
            download.go_on()
        except ModelError:
            if settings.backend != "auto" or settings.onnx is None:
                raise
            return self._equip(replace(settings, backend="onnx"), job)
        return None

    def expects(self, found: Match) -> bool:
        """Say whether a topic is of what is being fetched."""
        return self._fetch is not None and found.kind in ("onnx_manifest", "onnx_chunk")

    def take(self, found: Match, incoming: Incoming) -> None:
        """Take a part of what is being fetched; see `ArtifactFetch.take`."""
        assert self._fetch is not None, "expected"
        self._fetch.take(found, incoming)

    def _wait(self, job: Job) -> None:
        """Wait for the manifest; say for what if it does not come.

        Raises:
            ArtifactWanted: it does not come, and the owner does not want to wait.
        """
        self._ticks += 1
        if self._ticks < PATIENCE_TICKS:
            return
        why = (
            f"job {job.job!r} offers none so far: ask its operator for `aggregator serve --onnx`, "
            "or make one with `edge-client export-onnx MODEL --out DIR` on a computer with torch, "
            "copy it here and give --onnx DIR"
        )
        if not self._settings.wait_for_broker:
            raise ArtifactWanted(f"training with ONNX Runtime needs an artifact set; {why}")
        self._waiting.say("an artifact set, to train with ONNX Runtime", why)
