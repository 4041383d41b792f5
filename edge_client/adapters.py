"""The adapters that a device has to do with: fetched one at a time, gone on with, or tried."""

from __future__ import annotations

from collections.abc import Callable

from edge_client.config import Settings
from edge_client.download import Source, wanted_bands
from edge_client.fetch import Fetch
from edge_client.holding import Holding
from edge_client.learning import Learning
from edge_client.outbox import Outbox
from edge_client.plans import Reach
from edge_client.traffic import traffic_of
from edge_client.trying import PATIENCE_TICKS, SPLIT, Trying, can_be_told, to_try
from protocol.adapter import Adapter
from protocol.bands import Band
from protocol.errors import ProtocolError
from protocol.events import EventLog
from protocol.link import DeviceLink, Incoming
from protocol.messages import Job, Round
from protocol.topics import Match


class Adapters:
    """Fetch what a round needs: a manifest, the adapter to go on with, those to be tried.

    `reach` says what the device can do now, `download_bytes` what its link affords for a version
    (default: as the settings have it).
    """

    def __init__(
        self,
        settings: Settings,
        job: Job,
        link: DeviceLink,
        outbox: Outbox,
        learner: Learning,
        events: EventLog,
        reach: Callable[[], Reach],
        download_bytes: Callable[[], float] | None = None,
    ) -> None:
        self._download_bytes = download_bytes or (lambda: settings.download_bytes)
        self.held = Holding(job, settings.name)
        self.trying: Trying | None = None
        self._settings, self._job = settings, job
        self._link, self._outbox, self._learner = link, outbox, learner
        self._events = events
        self._reach = reach
        self._fetch: Fetch | None = None

    @property
    def outstanding(self) -> int:
        """How many messages of what is being fetched are to come yet."""
        return self._fetch.outstanding if self._fetch is not None else 0

    def expects(self, found: Match) -> bool:
        """Say whether a topic is of what is being fetched."""
        return self._fetch is not None and self._fetch.source.has(found)

    def take(self, found: Match, incoming: Incoming, now: Round) -> None:
        """Take a part of what is being fetched; when that is whole, use it and fetch the next.

        Raises:
            ProtocolError: it is not what it should be, and nothing that is only to be tried.
        """
        fetch = self._fetch
        assert fetch is not None, "expected"
        try:
            fetch.take(found, incoming, self._settings.state)
            if not fetch.complete:
                return
            self._use(fetch, now)
        except ProtocolError as error:
            if not fetch.source.is_tried:
                raise
            self._skip(now, str(error))
        self.fetch_next(now)

    def needs(self, now: Round) -> bool:
        """Say whether anything is being fetched for a round, or is to be."""
        return self._fetch is not None or self._missing(now) is not None

    def fetch_next(self, now: Round) -> bool:
        """Fetch what is missing for a round, and say whether anything is."""
        wanted, fetch = self._missing(now), self._fetch
        if fetch is not None:
            if (fetch.source, fetch.wanted) == wanted:
                return True
            fetch.end()
            self._fetch = None
        if wanted is None:
            return False
        source, bands = wanted
        known = self.held.heading if bands and source.kind == "global" else None
        self._fetch = Fetch(self._link, self._job, source, bands, known)
        return True

    def wait(self, now: Round) -> None:
        """Count a tick in which nothing has come: what is only to be tried gets few of them."""
        if self._fetch is None:
            return
        self._fetch.ticks += 1
        if self._fetch.source.is_tried and self._fetch.ticks > PATIENCE_TICKS:
            self._skip(now, "nothing of it has come")
            self.fetch_next(now)

    def truncate(self, held: int) -> None:
        """Hold fewer directions from now on; losses compare only at one rank, so try anew."""
        self.held.truncate(held)
        self.trying = None

    def begin_trying(self, now: Round) -> bool:
        """Begin to try what a round's version offers; False if that has been done."""
        if not self._job.is_personal or self._is_trying(now):
            return False
        held = self.held
        assert held.heading is not None and held.source is not None
        self.trying = Trying(
            now.version,
            to_try(held.heading, held.device, held.bands, self._byte_budget()),
            received=self._learner.evaluate(held.adapter, SPLIT),
            own=self._outbox.own_loss(now.job, now.version - 1),
        )
        return True

    def _is_trying(self, now: Round) -> bool:
        return self.trying is not None and self.trying.version == now.version

    def _missing(self, now: Round) -> tuple[Source, tuple[Band, ...]] | None:
        """Return what is to be fetched next, and which of its bands: none, its manifest alone."""
        held = self.held
        if (source := held.missing(now.version)) is not None:
            known = held.heading is not None and held.heading.version == now.version
            return source, self._bands() if known else ()
        if self._outbox.pending(held.job.job):
            return None
        if now.state == "finished":
            source = held.missing_at_end()
            bands = held.bands if source is not None and source.is_tried else self._bands()
            return (source, bands) if source is not None else None
        if now.state == "open" and self._is_trying(now):
            assert self.trying is not None
            return (self.trying.next, held.bands) if self.trying.next is not None else None
        return None

    def _bands(self) -> tuple[Band, ...]:
        now, budget = self._reach(), self._byte_budget()
        return tuple(wanted_bands(self._job, rank=now.rank, held=now.held, byte_budget=budget))

    def _byte_budget(self) -> float:
        """Return what a version may take, by the link and the owner."""
        now = self._reach()
        traffic = traffic_of(self._settings, self._job, now.blocks)
        return min(self._download_bytes(), traffic.left_to_download(now.rank))

    def _use(self, fetch: Fetch, now: Round) -> None:
        """Go on with what has been fetched, or see how it does."""
        held, source, manifest = self.held, fetch.source, fetch.manifest
        assert manifest is not None, "it is complete"
        if not fetch.wanted:
            own = manifest.personal.get(held.device)
            if own is not None:
                self._outbox.check_personal(self._job.job, own)
            held.begin(manifest)
            return
        adapter = fetch.adapter()
        if source.is_tried and now.state == "finished":
            held.sharper, held.has_looked = adapter, True
        elif source.is_tried:
            self._try(source, adapter, now)
        elif held.version == now.version:  # it has its own: this one is beside it, in the end
            held.common = adapter
        else:
            held.install(source, adapter, fetch.wanted)
        self._events.emit("bytes", up=self._link.bytes_sent, down=self._link.bytes_received)

    def _try(self, source: Source, adapter: Adapter, now: Round) -> None:
        loss = self._learner.evaluate(adapter, SPLIT)
        if self.trying is None:
            return
        if not can_be_told(loss):
            self._skip(now, f"its loss is {loss}")
            return
        self.trying.found(loss)
        told = {"loss": loss, "received": self.trying.received}
        self._events.emit("tried", round=now.number, adapter=str(source), **told)

    def _skip(self, now: Round, why: str) -> None:
        """Leave out an adapter that was to be tried: it is no reason not to train, or to end."""
        assert self._fetch is not None, "which is given up"
        left_out = str(self._fetch.source)
        self._events.emit("not-tried", round=now.number, adapter=left_out, reason=why)
        if now.state == "finished":
            self.held.has_looked = True
        elif self.trying is not None:
            self.trying.skip()
