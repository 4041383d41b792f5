"""Put the job, the round and versions on the broker, retained, so that it serves them alone."""

from __future__ import annotations

from collections.abc import Callable

from aggregator.errors import StoreError
from aggregator.rounds import RoundState
from aggregator.store import Store
from protocol import topics
from protocol.chunks import split
from protocol.errors import os_words
from protocol.faults import fault_point
from protocol.messages import FileInfo, GlobalManifest, Job, Round, describe_file
from protocol.signing import SigningKey
from protocol.transport import MqttTransport

VERSIONS_KEPT = 2
"""Versions on the broker: the newest, and the one that devices may still be downloading. The state
keeps at least these: a manifest says which topics are to be cleared."""
PUBLISH_TIMEOUT_S = 120.0


class Publisher:
    """Publish what the aggregator says to everybody; `meanwhile` takes in what comes."""

    def __init__(
        self,
        job: Job,
        store: Store,
        key: SigningKey,
        link: MqttTransport,
        meanwhile: Callable[[], None],
    ) -> None:
        self._job = job
        self._store = store
        self._key = key
        self._link = link
        self._meanwhile = meanwhile

    def job(self) -> None:
        topic = topics.topic("job", job=self._job.job)
        self._send([(topic, self._key.seal(self._job, topic))])

    def round(self, state: RoundState, fraction: float) -> None:
        """Publish where the job stands; `fraction` of the fleet is asked."""
        topic = topics.topic("round", job=self._job.job)
        message = Round(
            job=self._job.job,
            number=state.number,
            state=state.state,
            version=state.version,
            deadline=state.deadline,
            fraction=fraction,
            attempt=state.attempt,
        )
        self._send([(topic, self._key.seal(message, topic))])

    def version(self, manifest: GlobalManifest) -> None:
        """Publish a version whole, its manifest last, and clear the one that is too old.

        Raises:
            StoreError: a file of it is not there, or not what it was.
        """
        for band, info in manifest.bands.items():
            data = self._read(manifest.version, band, info)
            self._send(
                [
                    (self._chunk_topic(manifest.version, band, index), chunk)
                    for index, chunk in enumerate(split(data))
                ]
            )
            fault_point("aggregator.version.publishing")
        topic = topics.topic("global_manifest", job=self._job.job, version=manifest.version)
        self._send([(topic, self._key.seal(manifest, topic))])
        old = self._store.version(manifest.version - VERSIONS_KEPT)
        if old is not None:
            self._clear(old)

    def _read(self, version: int, band: str, info: FileInfo) -> bytes:
        path = self._store.band_file(version, band)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"can't read version {version}: {os_words(error)}") from None
        if describe_file(data) != info:
            raise StoreError(
                f"{path} is not what version {version} was published as; bring the state folder "
                "back from a backup, or begin anew with another --state folder and job name"
            )
        return data

    def _clear(self, manifest: GlobalManifest) -> None:
        """Take a version off the broker: an empty retained message each, its manifest first."""
        names = [topics.topic("global_manifest", job=self._job.job, version=manifest.version)]
        for band, info in manifest.bands.items():
            names += [
                self._chunk_topic(manifest.version, band, index)
                for index in range(len(info.chunks))
            ]
        self._send([(name, b"") for name in names])

    def _chunk_topic(self, version: int, band: str, index: int) -> str:
        return topics.topic(
            "global_chunk", job=self._job.job, version=version, band=band, index=index
        )

    def _send(self, messages: list[tuple[str, bytes]]) -> None:
        for delivery in self._link.publish_all(
            messages, retain=True, timeout_s=PUBLISH_TIMEOUT_S, meanwhile=self._meanwhile
        ):
            delivery.check()
