"""Put the job, the round and versions on the broker, retained, so that it serves them alone."""

from __future__ import annotations

from collections.abc import Callable

from aggregator.errors import StoreError
from aggregator.link import Link
from aggregator.places import Place, beside, common
from aggregator.rounds import Policy, RoundState
from aggregator.store import Store
from protocol import topics
from protocol.chunks import split
from protocol.errors import os_words
from protocol.faults import fault_point
from protocol.messages import FileInfo, GlobalManifest, Job, Round, describe_file
from protocol.signing import SigningKey

VERSIONS_KEPT = 2
"""Versions on the broker: the newest, and the one that devices may still be downloading. The state
keeps at least these: a manifest says which topics are to be cleared."""


class Publisher:
    """Publish what the aggregator says to everybody; `meanwhile` takes in what comes."""

    def __init__(
        self,
        job: Job,
        store: Store,
        key: SigningKey,
        link: Link,
        meanwhile: Callable[[], None],
    ) -> None:
        self._job = job
        self._store = store
        self._key = key
        self._link = link
        self._meanwhile = meanwhile
        self.last_round = b""
        """What was last said of where the job stands."""

    def job(self) -> None:
        topic = topics.topic("job", job=self._job.job)
        self._send([(topic, self._key.seal(self._job, topic))])

    def round(self, state: RoundState, policy: Policy) -> None:
        """Publish where the job stands, and who is asked by the policy."""
        topic = topics.topic("round", job=self._job.job)
        message = Round(
            job=self._job.job,
            number=state.number,
            state=state.state,
            version=state.version,
            deadline=state.deadline,
            fraction=policy.share(state.attempt),
            attempt=state.attempt,
            behind=policy.max_staleness if policy.buffer else 0,
        )
        self.last_round = self._key.seal(message, topic)
        self._send([(topic, self.last_round)])

    def version(self, manifest: GlobalManifest, *, again: bool = False) -> None:
        """Publish a version whole, its manifest last, and clear what is too old.

        What there is beside the common adapter comes before it: what is new with this version, or
        `again` all that its manifest names, for a broker that may have lost it.

        Raises:
            StoreError: a file of it is not there, or not what it was.
        """
        for place in beside(manifest):
            if again or place.version == manifest.version:
                theirs = self._store.issued.manifest(place)
                assert theirs is not None, "it is committed with the manifest that names it"
                self._publish(place, theirs)
                fault_point("aggregator.personal.published")
        self._publish(common(manifest.version), manifest)
        self._clear_after(manifest)

    def _publish(self, place: Place, manifest: GlobalManifest) -> None:
        for band, info in manifest.bands.items():
            chunks = split(self._read(place, band, info))
            self._send(
                [
                    (place.chunk_topic(self._job.job, band, index), chunk)
                    for index, chunk in enumerate(chunks)
                ]
            )
            fault_point("aggregator.version.publishing")
        topic = place.manifest_topic(self._job.job)
        self._send([(topic, self._key.seal(manifest, topic))])

    def _read(self, place: Place, band: str, info: FileInfo) -> bytes:
        path = self._store.band_file(place, band)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"can't read {place}: {os_words(error)}") from None
        if describe_file(data) != info:
            raise StoreError(
                f"{path} is not what {place} was published as; bring the state folder "
                "back from a backup, or begin anew with another --state folder and job name"
            )
        return data

    def _clear_after(self, manifest: GlobalManifest) -> None:
        """Clear the version that is too old, and what no newer one has beside it."""
        old = self._store.version(manifest.version - VERSIONS_KEPT)
        if old is None:
            return
        self._clear(common(old.version), old)
        newer = map(self._store.version, range(old.version + 1, manifest.version + 1))
        needed = {place for kept in newer if kept is not None for place in beside(kept)}
        for place in beside(old):
            theirs = self._store.issued.manifest(place)
            if place not in needed and theirs is not None:
                self._clear(place, theirs)

    def _clear(self, place: Place, manifest: GlobalManifest) -> None:
        """Take an adapter off the broker: an empty retained message each, its manifest first."""
        names = [place.manifest_topic(self._job.job)]
        for band, info in manifest.bands.items():
            names += [
                place.chunk_topic(self._job.job, band, index) for index in range(len(info.chunks))
            ]
        self._send([(name, b"") for name in names])

    def _send(self, messages: list[tuple[str, bytes]]) -> None:
        for delivery in self._link.publish_all(messages, retain=True, meanwhile=self._meanwhile):
            delivery.check()
