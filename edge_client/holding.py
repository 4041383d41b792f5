"""Which adapters of a job a device holds, and which it has to fetch next."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.download import Source
from protocol.adapter import Adapter
from protocol.bands import Band
from protocol.errors import MalformedMessage
from protocol.messages import GlobalManifest, Job, Round


@dataclass(slots=True)
class Holding:
    """Hold the adapter that a device goes on with: its own, or the common one."""

    job: Job
    device: str
    heading: GlobalManifest | None = None
    """The common manifest of the newest version, which says for whom there is more."""
    version: int | None = None
    """The version that the device has all it needs of to train."""
    source: Source | None = None
    adapter: Adapter | None = None
    bands: tuple[Band, ...] = ()
    common: Adapter | None = None
    """The common adapter, fetched beside its own in the end."""
    sharper: Adapter | None = None
    """Its own at a sharper temperature, in the end; None also where it could not be had."""
    has_looked: bool = False
    """Whether the sharper one has been fetched, or given up."""

    @property
    def personal(self) -> int | None:
        """The version of its own adapter, if it goes on with one."""
        return self.source.version if self.source and self.source.kind == "personal" else None

    def common_of(self, version: int) -> Source:
        return Source(self.job.job, self.device, "global", version)

    def begin(self, heading: GlobalManifest) -> None:
        """Go over to another version: from now on it is the one that `missing` is about.

        An adapter of its own that the device has already is not fetched again.

        Raises:
            MalformedMessage: it gives the device an adapter of a later version.
        """
        own = heading.personal.get(self.device)
        if own is not None and own > heading.version:
            raise MalformedMessage(
                f"version {heading.version}", f"it names an adapter of version {own}"
            )
        self.heading = heading
        self.common, self.sharper, self.has_looked = None, None, False
        if own is not None and own == self.personal:
            self.version = heading.version

    def missing(self, version: int) -> Source | None:
        """Return what a round that starts from `version` needs yet."""
        if self.heading is None or self.heading.version != version:
            return self.common_of(version)
        if self.version == version:
            return None
        own = self.heading.personal.get(self.device)
        if own is None:
            return self.common_of(version)
        return Source(self.job.job, self.device, "personal", own)

    def missing_at_end(self) -> Source | None:
        """Return what a device with its own adapter compares that with when nobody trains on."""
        heading = self.heading
        if heading is None or self.personal is None:
            return None
        if self.common is None:
            return self.common_of(heading.version)
        if self.device in heading.trials and not self.has_looked:
            return Source(self.job.job, self.device, "trial", heading.version)
        return None

    def install(self, source: Source, adapter: Adapter, bands: tuple[Band, ...]) -> None:
        """Go on with an adapter that is complete and checked."""
        assert self.heading is not None, "which says that it is the one"
        self.source, self.adapter, self.bands = source, adapter, bands
        self.version = self.heading.version

    def truncate(self, held: int) -> None:
        """Keep no more than `held` directions."""
        if self.adapter is not None:
            self.adapter = self.adapter.truncated(held)


def goes_on_with(begun: Round | None, newest: Round) -> Round:
    """Return the round that a device is to be at: the newest, or one whose training was paused.

    That is so as long as what comes of it counts: in a buffered round an update may be `behind`. A
    round that has moved on otherwise is never trained for.
    """
    if begun is None or newest.state != "open" or begun.number == newest.number:
        return newest
    return begun if newest.number - begun.number <= newest.behind else newest
