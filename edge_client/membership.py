"""What a device has from joining a fleet: its name, where the broker is, its certificate.

fleet.json   name and broker; written last: where it is, the rest is
tls.key      device.pem  ca.pem    who it is at the broker, and whom it trusts there
device.key   Ed25519, of its messages    aggregator.pub   the key of the aggregator's
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_client.config import default_state
from edge_client.errors import ConfigError
from protocol.messages import Name, Text
from protocol.tls import TlsFiles
from protocol.transport import BrokerAddress

FILE = "fleet.json"


class Membership(BaseModel):
    """A device's place in a fleet."""

    model_config = ConfigDict(frozen=True)
    device: Name
    broker: Text


def read_membership(state: Path) -> Membership | None:
    """Return what a device has joined; None if nothing.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        return Membership.model_validate_json((state / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise ConfigError(f"--state {state} is a file; name a folder") from None
    except OSError as error:
        raise ConfigError(f"can't read {state / FILE}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ConfigError(
            f"{state / FILE} is damaged ({where}{first['msg']}); bring it back from a backup, or "
            "join the fleet again with a new token"
        ) from None


def join_begun(state: Path) -> bool:
    """Say whether a device has made the key that it joins with, the first thing that it does."""
    return tls_files(state).key.exists()


def state_folder(name: str, host_name: str) -> Path:
    """Return the default state folder: the host's if that has to do with a fleet, or the name's."""
    joined = default_state(host_name)
    ours = read_membership(joined) or join_begun(joined)
    return joined if ours else default_state(name or host_name)


def tls_files(state: Path) -> TlsFiles:
    """Return where a device keeps what TLS needs."""
    return TlsFiles(state / "ca.pem", state / "device.pem", state / "tls.key")


def identity(
    state: Path, *, name: str, broker: str, default_name: str
) -> tuple[str, BrokerAddress, TlsFiles | None]:
    """Return a device's name, broker and TLS files: as joined, and as the owner says otherwise.

    Raises:
        ConfigError: joining was begun and not finished, or the owner gives another name than the
            certificate has.
        TransportError: `broker` is not an address.
    """
    joined = read_membership(state)
    if joined is None and join_begun(state):
        raise ConfigError(
            f"this device has begun to join a fleet, and has not finished (its keys are in {state})"
            ": join again (edge-client join), or name another --state to go on without a fleet"
        )
    if joined is None:
        return name or default_name, BrokerAddress.parse(broker or "mqtt://127.0.0.1:1883"), None
    if name and name != joined.device:
        raise ConfigError(
            f"this device has joined as {joined.device!r}; leave --name out, or give another "
            "--state to be somebody else"
        )
    address = BrokerAddress.parse(broker or joined.broker)
    return joined.device, address, tls_files(state) if address.tls else None
