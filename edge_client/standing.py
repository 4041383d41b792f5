"""What a device says of itself in a job, and whether the name that it says it by is its own."""

from __future__ import annotations

from edge_client.config import Settings
from edge_client.errors import NameTaken
from protocol import topics
from protocol.link import DeviceLink
from protocol.messages import Status
from protocol.signing import SigningKey, open_message


class Standing:
    """A device's status in one job, whose last one is its will.

    Of two who go by one name the aggregator knows the one whose status was first on the topic. Both
    see the same order there, so that the second one can end, and the first go on.
    """

    def __init__(self, settings: Settings, job: str, boot: int, key: SigningKey) -> None:
        self.topic = topics.topic("status", job=job, device=settings.name)
        self._settings = settings
        self._job = job
        self._boot = boot
        self._key = key
        self._known = settings.tls is not None
        """Whether the name is this device's own: by its certificate, or since its status came."""
        self._last = b""

    @property
    def will(self) -> tuple[str, bytes]:
        """Return what the broker is to publish when this device is gone: topic and payload."""
        return self.topic, self._sealed("stopped")

    def claim(self, link: DeviceLink) -> None:
        """Say at once that this device is here, and hear whether somebody else has said so.

        A device with a certificate has its name from it, and may not read the topic.

        Raises:
            TransportError: the broker does not answer, or refuses it.
        """
        if not self._known:
            link.subscribe([self.topic])
        self.announce(link, "planning")

    def announce(
        self,
        link: DeviceLink,
        state: str,
        *,
        rank: int = 0,
        version: int | None = None,
        detail: str = "",
    ) -> None:
        """Publish a status, now and after every reconnection; a stopped device is not online.

        Raises:
            TransportError: the broker does not answer, or refuses it.
        """
        self._last = self._sealed(state, rank=rank, version=version, detail=detail)
        link.announce(self.topic, self._last)

    def hear(self, link: DeviceLink, payload: bytes) -> None:
        """Take in a status from the topic; who says another one by a name that is known will end.

        Raises:
            ProtocolError: it can't be read, or nobody has signed it.
            NameTaken: the name is somebody else's; nothing more is said by it.
        """
        _, key = open_message(payload, self.topic, Status)
        if key == self._key.public:
            self._known = True
        elif self._known:
            link.announce(self.topic, self._last)  # the broker keeps what it was told last
        else:
            link.close()
            raise NameTaken(self._settings.name, self._job)

    def _sealed(
        self, state: str, *, rank: int = 0, version: int | None = None, detail: str = ""
    ) -> bytes:
        status = Status.model_validate(
            {
                "job": self._job,
                "device": self._settings.name,
                "online": state != "stopped",
                "boot": self._boot,
                "state": state,
                "profile": self._settings.profile.name,
                "rank": rank,
                "version": version,
                "detail": detail[:500],
            }
        )
        return self._key.seal(status, self.topic)
