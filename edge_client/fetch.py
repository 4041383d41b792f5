"""An adapter being fetched over the link: subscribed to, taken in part by part, left again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_client.download import Download, Source
from edge_client.trust import open_trusted
from protocol.adapter import Adapter
from protocol.bands import Band, parse_band
from protocol.errors import MalformedMessage
from protocol.link import DeviceLink, Incoming
from protocol.messages import GlobalManifest, Job
from protocol.topics import Match


class Fetch:
    """Fetch one adapter: its manifest, then the chunks of the wanted bands.

    Without any band it is the manifest alone that is wanted; a `manifest` that is known already
    is not asked for again.
    """

    def __init__(
        self,
        link: DeviceLink,
        job: Job,
        source: Source,
        wanted: Sequence[Band],
        manifest: GlobalManifest | None = None,
    ) -> None:
        self.source, self.wanted = source, tuple(wanted)
        self.manifest: GlobalManifest | None = None
        self.ticks = 0
        """For how long nothing of it has come, in the agent's ticks."""
        self._link, self._job = link, job
        self._download: Download | None = None
        self._filters: list[str] = []
        if manifest is None:
            self._listen([source.manifest_topic])
        else:
            self._begin(manifest)

    @property
    def complete(self) -> bool:
        if self._download is not None:
            return self._download.complete
        return self.manifest is not None

    @property
    def outstanding(self) -> int:
        """How many messages are to come yet, as far as is known."""
        if self._download is None:
            return 0 if self.manifest is not None else 1
        return self._download.outstanding

    def take(self, found: Match, incoming: Incoming, state: Path) -> None:
        """Take a message on one of its topics (`Source.has`).

        Raises:
            ProtocolError: it is not what it should be.
        """
        self.ticks = 0
        if "index" not in found.fields:
            manifest = open_trusted(incoming, GlobalManifest, state)
            if self.manifest is None:
                self._begin(manifest)
        elif self._download is not None:
            band, index = parse_band(found.fields["band"]), int(found.fields["index"])
            self._download.add(band, index, incoming.payload)

    def adapter(self) -> Adapter:
        """Return what has been fetched, once it is complete.

        Raises:
            ProtocolError: it is not what its manifest says, or not of this job.
        """
        assert self._download is not None
        return self._download.adapter()

    def end(self) -> None:
        """Listen no more."""
        self._link.unsubscribe(self._filters)
        self._filters = []

    def _begin(self, manifest: GlobalManifest) -> None:
        if (manifest.job, manifest.version) != (self._job.job, self.source.version):
            raise MalformedMessage(
                self.source.manifest_topic,
                f"it is of version {manifest.version} of job {manifest.job!r}",
            )
        if self.wanted:
            self._download = Download(self._job, manifest, self.wanted)
            self._listen(self.source.chunk_topics(self.wanted))
        self.manifest = manifest

    def _listen(self, filters: list[str]) -> None:
        self._filters += filters
        self._link.subscribe(filters)
