"""Clocks: certificates end and are renewed, and one that was wrong does no lasting harm."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from aggregator.enrol.ca import Authority, key_pem, pem
from aggregator.enrol.folder import FleetFolder
from aggregator.enrol.server import EnrolmentServer
from edge_client.errors import JoinRefused
from edge_client.join import join
from protocol.errors import CertificateUnusable, TlsRefused
from protocol.events import EventLog
from protocol.tls import TlsFiles, client_context, refusal
from tests.security.fleet import LEAVES_SOCKET, Fleet, make_folder

pytestmark = [pytest.mark.timeout(60), LEAVES_SOCKET]

YEAR = timedelta(days=365)
OWN = ("server.pem", "aggregator.pem")


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def dated(
    authority: Authority, found: x509.Certificate, begin: datetime, end: datetime
) -> x509.Certificate:
    """Return a certificate as it would be with other dates."""
    builder = x509.CertificateBuilder(
        found.issuer,
        found.subject,
        found.public_key(),  # type: ignore[arg-type]
        found.serial_number,
        begin,
        end,
        list(found.extensions),
    )
    return builder.sign(authority.key, hashes.SHA256())


def soon(fleet: Fleet, holds: Callable[[], bool]) -> None:
    """Wait until Mosquitto has dealt with SIGHUP, which it does between two messages."""
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def refused(fleet: Fleet, files: TlsFiles) -> bool:
    return bool(refusal("localhost", fleet.folder.port, files.context()))


def shown_by_the_broker(folder: FleetFolder) -> bytes:
    """Return the broker's certificate in DER, as a client sees it."""
    context = client_context(folder.ca_pem())
    with (
        socket.create_connection(("127.0.0.1", folder.port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as link,
    ):
        return link.getpeercert(binary_form=True) or b""


def test_server_and_aggregator_are_renewed_in_time(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    assert fleet.folder.renew(fleet.clock()) == []
    later = fleet.clock() + timedelta(days=600)
    assert fleet.folder.renew(later) == ["server.pem", "aggregator.pem"]
    assert fleet.folder.renew(later) == []
    for name in OWN:
        found = certificate(fleet.folder.path / name)
        assert found.not_valid_after_utc - later > timedelta(days=728)
    shown = certificate(fleet.folder.server_certificate).public_bytes(serialization.Encoding.DER)
    soon(fleet, lambda: shown_by_the_broker(fleet.folder) == shown)
    fleet.link(files, "kitchen")


def test_what_a_clock_two_years_ahead_has_issued_is_good_by_a_right_one(fleet: Fleet) -> None:
    assert fleet.folder.renew(fleet.clock() + 2 * YEAR) == list(OWN)
    fleet.clock.ahead = 2 * YEAR
    files = fleet.join("kitchen")
    fleet.clock.ahead = timedelta()
    assert fleet.folder.renew(fleet.clock()) == []
    fleet.aggregator()
    fleet.link(files, "kitchen")
    fleet.link(fleet.join("desk"), "desk")


def test_certificates_of_a_time_to_come_are_issued_again(fleet: Fleet) -> None:
    """As an earlier release made them when the clock was wrong."""
    authority, now = fleet.folder.authority(), fleet.clock()
    for name in OWN:
        path = fleet.folder.path / name
        path.write_bytes(pem(dated(authority, certificate(path), now + YEAR, now + 3 * YEAR)))
    fleet.folder.reload_broker()
    with pytest.raises(CertificateUnusable, match="not valid before"):
        fleet.aggregator()
    assert fleet.folder.renew(now) == list(OWN)
    soon(fleet, lambda: not refused(fleet, fleet.folder.tls))
    fleet.aggregator()
    fleet.link(fleet.join("kitchen"), "kitchen")


def test_a_clock_that_is_behind_takes_nothing_from_a_certificate(fleet: Fleet) -> None:
    authority, now = fleet.folder.authority(), fleet.clock()
    path = fleet.folder.server_certificate
    path.write_bytes(pem(dated(authority, certificate(path), now, now + 5 * YEAR)))
    assert fleet.folder.renew(now - 40 * YEAR) == ["server.pem"]
    found = certificate(path)
    assert found.not_valid_before_utc == authority.certificate.not_valid_before_utc
    assert found.not_valid_after_utc - now > 5 * YEAR - timedelta(minutes=1)
    # Nor does it fail to let a device in, or a clock beyond the CA's own end.
    for then in (now - 40 * YEAR, now + 20 * YEAR):
        issued = authority.client("kitchen", then).certificate
        own = authority.certificate
        assert issued.not_valid_before_utc < now < issued.not_valid_after_utc
        assert issued.not_valid_after_utc <= own.not_valid_after_utc


def test_who_is_revoked_by_a_clock_a_year_ahead_is_out_and_nobody_else(fleet: Fleet) -> None:
    files, desk = fleet.join("kitchen"), fleet.join("desk")
    fleet.folder.revoke("kitchen", fleet.clock() + YEAR)
    fleet.folder.reload_broker()
    soon(fleet, lambda: refused(fleet, files))
    with pytest.raises(TlsRefused, match="has been revoked"):
        fleet.link(files, "kitchen")
    fleet.link(desk, "desk")


def test_a_list_of_a_time_to_come_is_written_again(fleet: Fleet) -> None:
    """As an earlier release made it when the clock was wrong: with it nobody gets in."""
    files, desk = fleet.join("kitchen"), fleet.join("desk")
    fleet.folder.revoke("kitchen", fleet.clock())
    authority, path = fleet.folder.authority(), fleet.folder.path / "crl.pem"
    old = x509.load_pem_x509_crl(path.read_bytes())
    builder = x509.CertificateRevocationListBuilder(
        old.issuer, fleet.clock() + YEAR, old.next_update_utc, list(old.extensions), list(old)
    )
    wrong = builder.sign(authority.key, hashes.SHA256())
    path.write_bytes(wrong.public_bytes(serialization.Encoding.PEM))
    fleet.folder.reload_broker()
    soon(fleet, lambda: refused(fleet, desk))
    assert fleet.folder.renew(fleet.clock()) == ["crl.pem"]
    soon(fleet, lambda: not refused(fleet, desk))
    fleet.link(desk, "desk")
    with pytest.raises(TlsRefused, match="has been revoked"):
        fleet.link(files, "kitchen")


def test_each_list_is_newer_than_the_one_before_and_of_no_time_to_come(fleet: Fleet) -> None:
    """OpenSSL goes by the newer one of two, should a broker keep the old one beside the new."""
    path, before = fleet.folder.path / "crl.pem", x509.load_pem_x509_crl
    dates = [before(path.read_bytes()).last_update_utc]
    for name in ("desk", "kitchen", "attic"):
        fleet.join(name)
        fleet.folder.revoke(name, fleet.clock())
        dates.append(before(path.read_bytes()).last_update_utc)
        assert fleet.folder.renew(fleet.clock()) == []
    assert dates == sorted(set(dates))
    assert dates[-1] < fleet.clock() - timedelta(hours=23)


@pytest.mark.parametrize("damage", ["missing", "no list", "of another fleet", "out of date"])
def test_a_list_that_is_not_good_is_written_again(tmp_path: Path, damage: str) -> None:
    folder, now = make_folder(tmp_path / "fleet"), datetime.now().astimezone()
    path = folder.path / "crl.pem"
    old = path.read_bytes()
    serial, key = folder.authority().client("kitchen", now).certificate.serial_number, "key"
    registry = folder.registry()
    registry.add_token("digest", "kitchen", expires=now.timestamp() + 60)
    registry.admit(
        "digest", "keys", "kitchen", key, certificate="", serial=serial, expires=now.timestamp()
    )
    registry.close()
    folder.revoke("kitchen", now)
    if damage == "missing":
        path.unlink()
    elif damage == "no list":
        path.write_bytes(b"-----BEGIN X509 CRL-----\n")
    elif damage == "of another fleet":
        path.write_bytes(make_folder(tmp_path / "other").authority().revocations([(serial, now)]))
    else:
        path.write_bytes(old)  # the aggregator ended between its own list and this
    assert folder.renew(now) == ["crl.pem"]
    assert [one.serial_number for one in x509.load_pem_x509_crl(path.read_bytes())] == [serial]
    assert folder.renew(now) == []


def test_a_clock_that_is_a_year_off_is_named(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    with pytest.raises(CertificateUnusable, match=r"not valid before .*clock is wrong"):
        files.context(fleet.clock() - YEAR)


@pytest.mark.parametrize(("days", "when"), [(365, "not valid yet"), (-800, "expired")])
def test_a_server_of_another_time_is_refused_with_a_word_on_clocks(
    fleet: Fleet, days: int, when: str
) -> None:
    other = make_folder(fleet.devices.parent / "other", timedelta(days=days))
    token = str(other.issue_token("kitchen", hours=1, now=fleet.clock()))
    with (
        EnrolmentServer(other, EventLog(as_json=True, stream=fleet.log), port=0) as server,
        pytest.raises(JoinRefused, match=f"certificate is {when}.*clock is wrong"),
    ):
        join(f"https://localhost:{server.port}", token, fleet.devices / "kitchen")


def test_a_certificate_that_has_expired_is_named_by_the_broker_too(fleet: Fleet) -> None:
    """A device whose clock is behind takes its own certificate for good."""
    files, now, authority = fleet.join("kitchen"), fleet.clock(), fleet.folder.authority()
    new = authority.client("kitchen", now)
    old = dated(authority, new.certificate, now - 3 * YEAR, now - YEAR)
    files.certificate.write_bytes(pem(old))
    files.key.write_bytes(key_pem(new.key))
    context = files.context(now - 2 * YEAR)
    assert "has expired" in refusal("localhost", fleet.folder.port, context)
