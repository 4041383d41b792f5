"""A token is good once, for one fleet, for a while; keys stay where they were made."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from aggregator.enrol.folder import FleetFolder
from aggregator.enrol.server import CONNECTIONS, EnrolmentServer
from aggregator.errors import FolderError
from edge_client.errors import ConfigError, JoinRefused
from edge_client.join import join
from edge_client.membership import identity, read_membership
from protocol import topics
from protocol.enrolment import BODY_LIMIT_BYTES, REQUEST_TOPIC, EnrolRequest, Token
from protocol.errors import CertificateUnusable, MalformedMessage
from protocol.events import EventLog
from protocol.signing import SigningKey
from protocol.tls import client_context
from tests.security.fleet import LEAVES_SOCKET, Fleet, make_folder

pytestmark = [pytest.mark.timeout(60), LEAVES_SOCKET]


def test_a_device_joins_and_then_needs_neither_name_nor_broker(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    state = files.key.parent
    name, address, tls = identity(state, name="", broker="", default_name="some-host")
    assert (name, address, tls) == ("kitchen", fleet.folder.broker_for_devices, files)
    for secret in (state / "tls.key", state / "device.key", *fleet.folder.path.glob("*.key")):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600, secret
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE(fleet.folder.path.stat().st_mode) == 0o700
    assert (state / "aggregator.pub").read_text() == fleet.folder.signing_key().public
    pinned = SigningKey.load(state / "device.key").public
    assert fleet.folder.registry().signing_key("kitchen") == pinned

    aggregator, link = fleet.aggregator(), fleet.link(files, "kitchen")
    aggregator.subscribe([topics.subscription("status")])
    link.publish(topics.topic("status", job="notes", device="kitchen"), b"here").check()
    incoming = aggregator.receive(5)
    assert incoming is not None and incoming.payload == b"here"
    with pytest.raises(ConfigError, match="joined as 'kitchen'"):
        identity(state, name="desk", broker="", default_name="some-host")


def test_the_certificate_is_for_the_name_of_the_token_whatever_is_asked(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    found = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert found.subject.rfc4514_string() == "CN=kitchen"
    days = (found.not_valid_after_utc - fleet.clock()).days
    assert days in (729, 730)
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def refused(fleet: Fleet, token: str, why: str, state: str = "other") -> None:
    with pytest.raises(JoinRefused, match=why):
        join(fleet.url, token, fleet.devices / state)
    assert read_membership(fleet.devices / state) is None
    assert fleet.events()[-1]["event"] == "enrolment refused"


def test_a_damaged_list_of_devices_is_named_to_the_operator_alone(fleet: Fleet) -> None:
    token, path = fleet.token("kitchen"), fleet.folder.path / "state" / "devices.sqlite"
    path.write_bytes(b"no database" * 100)
    words = f"can't use the list of devices {path}: file is not a database"
    with pytest.raises(FolderError, match=words):
        fleet.token("desk")
    refused(fleet, token, "nobody can be let in now")
    assert fleet.events()[-1]["reason"].startswith(words)


def test_a_token_is_good_once(fleet: Fleet) -> None:
    token = fleet.token("kitchen")
    join(fleet.url, token, fleet.devices / "first")
    refused(fleet, token, "used already")


def test_a_token_that_expired_was_replaced_or_made_up(fleet: Fleet) -> None:
    first = fleet.token("kitchen", hours=1)
    second = fleet.token("kitchen", hours=1)
    refused(fleet, first, "no such token")
    fleet.clock.ahead = timedelta(hours=1)
    refused(fleet, second, "has expired")
    refused(fleet, str(Token(Token.parse(second).ca_sha256, bytes(24))), "no such token")


def test_a_token_that_lost_its_padding_is_whole() -> None:
    token = str(Token.issue(bytes(32)))
    assert str(Token.parse(token.rstrip("="))) == token


@pytest.mark.parametrize("text", ["", "tf1-", "tf1-" + "A" * 74, "A" * 76, "tf1-" + "ä" * 76])
def test_what_is_no_token(text: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedMessage, match="aggregator enroll"):
        join("https://localhost:1", text, tmp_path)


def test_a_join_that_was_cut_short_is_repeated(fleet: Fleet) -> None:
    """The aggregator had given the certificate, the device was killed before it was written."""
    token, state = fleet.token("kitchen"), fleet.devices / "kitchen"
    join(fleet.url, token, state)
    certificate = (state / "device.pem").read_bytes()
    for name in ("device.pem", "ca.pem", "fleet.json"):
        (state / name).unlink()
    assert join(fleet.url, token, state).device == "kitchen"
    assert (state / "device.pem").read_bytes() == certificate
    # It may be had again, but not by somebody who has the token and not the keys.
    shutil.copy(state / "tls.key", fleet.devices / "stolen.key")
    (state / "device.key").rename(fleet.devices / "device.key")
    with pytest.raises(JoinRefused, match="used already"):
        join(fleet.url, token, state)


def test_another_fleet_than_the_tokens_gets_nothing(fleet: Fleet) -> None:
    """Whoever sits between sees neither token nor request: the CA is checked before."""
    other = make_folder(fleet.devices.parent / "other")
    state = fleet.devices / "kitchen"
    with (
        EnrolmentServer(other, EventLog(as_json=True, stream=fleet.log), port=0) as server,
        pytest.raises(JoinRefused, match="not the fleet that the token is for"),
    ):
        join(f"https://localhost:{server.port}", fleet.token("kitchen"), state)
    assert fleet.events() == [] and not (state / "aggregator.pub").exists()


@contextmanager
def relay(fleet: Fleet, other: FleetFolder, ca: bytes) -> Iterator[str]:
    """Serve enrolment with another fleet's keys, and show this CA as if it were its own."""
    with EnrolmentServer(other, EventLog(as_json=True, stream=fleet.log), port=0) as server:
        (other.path / "ca.pem").write_bytes(ca)
        yield f"https://localhost:{server.port}"


def test_a_relay_with_the_right_ca_but_another_certificate_gets_nothing(fleet: Fleet) -> None:
    """It can show the CA's certificate, as anybody can, but has no server key under it."""
    other = make_folder(fleet.devices.parent / "other")
    with (
        relay(fleet, other, fleet.folder.ca_pem().encode()) as url,
        pytest.raises(JoinRefused, match="not to be trusted"),
    ):
        join(url, fleet.token("kitchen"), fleet.devices / "k")
    assert fleet.events() == []


def test_a_relay_that_adds_a_ca_of_its_own_gets_nothing(fleet: Fleet) -> None:
    """The token confirms one certificate; what stands behind it in the answer is not trusted."""
    other = make_folder(fleet.devices.parent / "other")
    both = fleet.folder.ca_pem() + other.ca_pem()
    with (
        relay(fleet, other, both.encode()) as url,
        pytest.raises(JoinRefused, match="not to be trusted"),
    ):
        join(url, fleet.token("kitchen"), fleet.devices / "k")
    assert fleet.events() == []


def test_a_device_does_not_pass_for_the_server(fleet: Fleet) -> None:
    """A certificate of the fleet's CA for a device is none for a server."""
    files, other = fleet.join("localhost"), make_folder(fleet.devices.parent / "other")
    shutil.copy(files.certificate, other.server_certificate)
    shutil.copy(files.key, other.server_key)
    with (
        relay(fleet, other, files.ca.read_bytes()) as url,
        pytest.raises(JoinRefused, match="not to be trusted"),
    ):
        join(url, fleet.token("kitchen"), fleet.devices / "k")


def test_another_name_for_the_server_is_refused(fleet: Fleet) -> None:
    port = int(fleet.url.rpartition(":")[2])
    with pytest.raises(JoinRefused, match="aggregator init --host"):
        join(f"https://127.1:{port}", fleet.token("kitchen"), fleet.devices / "k")


def test_a_name_keeps_its_signing_key_until_it_is_revoked(fleet: Fleet) -> None:
    fleet.join("kitchen")
    state = fleet.devices / "impostor"
    with pytest.raises(JoinRefused, match="another signing key"):
        join(fleet.url, fleet.token("kitchen"), state)
    fleet.folder.revoke("kitchen", fleet.clock())
    join(fleet.url, fleet.token("kitchen"), state)
    now = SigningKey.load(state / "device.key").public
    assert fleet.folder.registry().signing_key("kitchen") == now


def test_a_certificate_is_renewed_with_the_same_keys(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    before = files.certificate.read_bytes()
    later = fleet.clock() + timedelta(days=731)
    with pytest.raises(CertificateUnusable, match=r"expired on .* join again.*clock is wrong"):
        files.context(later)
    fleet.join("kitchen")
    assert files.certificate.read_bytes() != before
    fleet.link(files, "kitchen")


def test_a_folder_belongs_to_one_aggregator(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    other = make_folder(fleet.devices.parent / "other")
    token = str(other.issue_token("kitchen", hours=1, now=fleet.clock()))
    with (
        EnrolmentServer(other, EventLog(as_json=True, stream=fleet.log), port=0) as server,
        pytest.raises(JoinRefused, match="belongs to another aggregator"),
    ):
        join(f"https://localhost:{server.port}", token, files.key.parent)
    fleet.link(files, "kitchen")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{}", 400),
        (b"[" * 5000, 400),
        (b'{"body": "{}", "key": "a", "signature": "b"}', 400),
        (b"x" * (BODY_LIMIT_BYTES + 1), 413),
    ],
)
def test_a_request_that_can_not_be_read(fleet: Fleet, body: bytes, status: int) -> None:
    assert ask(fleet, body)[0] == status


def test_connections_that_say_nothing_are_bounded(fleet: Fleet) -> None:
    before = psutil.Process().num_fds()
    port = int(fleet.url.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * CONNECTIONS)]
    ended = 0
    for connection in reversed(silent):
        connection.settimeout(0.05 if ended else 5)
        with suppress(TimeoutError):
            ended += connection.recv(1) == b""
    assert ended >= 2 * CONNECTIONS
    # Ours at this end, and those of the server that it has not hung up on.
    assert psutil.Process().num_fds() - before <= len(silent) + CONNECTIONS + 4
    for connection in silent:
        connection.close()
    fleet.join("kitchen")


def test_weak_and_unreadable_certificate_requests(fleet: Fleet) -> None:
    key, token = SigningKey.generate(), fleet.token("kitchen")
    weak = rsa.generate_private_key(65537, 1024)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kitchen")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(weak, hashes.SHA256())
    weak_csr = csr.public_bytes(serialization.Encoding.PEM).decode()
    for wrong, why in ((weak_csr, "2048"), ("no PEM", "can't be read: it is no PKCS #10")):
        sealed = key.seal(EnrolRequest(token=token, csr=wrong), REQUEST_TOPIC)
        status, said = ask(fleet, sealed)
        assert status == 403 and why in said and "http" not in said
    # Signed for another purpose, it is no request.
    sealed = key.seal(EnrolRequest(token=token, csr=weak_csr), "enrol/answer")
    assert ask(fleet, sealed)[0] == 400
    changed = json.loads(key.seal(EnrolRequest(token=token, csr=weak_csr), REQUEST_TOPIC))
    changed["body"] = changed["body"].replace("BEGIN", "BEGIN ")
    assert ask(fleet, json.dumps(changed).encode())[0] == 400
    assert fleet.folder.registry().signing_key("kitchen") is None


def test_nonsense_is_told_once_a_minute_in_words_of_our_own(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    before = len(fleet.events())
    for _ in range(10):
        ask(fleet, b"{}")
        ask(fleet, b"x" * 100)
        with connected(fleet) as link:
            link.sendall(b"\x16nonsense\r\n\r\n")
            assert b"400" in link.recv(100)
        with connected(fleet) as link:
            link.sendall(b"POST /enroll HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
    deadline = time.monotonic() + 10
    while len(told := fleet.events()[before:]) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {e["event"] for e in told} == {"enrolment refused"}
    reasons = sorted(e["reason"] for e in told)
    assert len(reasons) == 4, "unsigned, unreadable, broken off, and no HTTP"
    assert reasons[-1] == "the request broke off before its end"
    assert "no HTTP request" in " ".join(reasons)
    for reason in reasons:
        assert not re.search(r"Exception|Error|ASGI|Disconnect|http", reason), reason
    said = capfd.readouterr()
    assert not said.err and not said.out


@contextmanager
def connected(fleet: Fleet) -> Iterator[ssl.SSLSocket]:
    """Connect to enrolment as a client that speaks for itself."""
    context, port = client_context(fleet.folder.ca_pem()), int(fleet.url.rpartition(":")[2])
    with (
        socket.create_connection(("localhost", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as link,
    ):
        yield link


def ask(fleet: Fleet, body: bytes) -> tuple[int, str]:
    """Post to enrolment and return status and text."""
    connection = http.client.HTTPSConnection(
        "localhost",
        int(fleet.url.rpartition(":")[2]),
        timeout=10,
        context=client_context(fleet.folder.ca_pem()),
    )
    connection.request("POST", "/enroll", body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text
