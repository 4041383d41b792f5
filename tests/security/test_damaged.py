"""A fleet's folder with a file that is missing, damaged or another's: which one, and what to do."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

from aggregator.enrol.folder import FleetFolder
from aggregator.enrol.server import EnrolmentServer
from aggregator.errors import FolderError
from protocol.errors import CertificateUnusable
from protocol.events import EventLog
from protocol.tls import TlsFiles
from tests.aggregator.test_disk_full import disk, fill
from tests.security.fleet import make_folder
from tests.security.test_commands import command, write_job

__all__ = ["disk"]
pytestmark = pytest.mark.timeout(120)

BACKUP = "bring it back from a backup"
SERVED = ("ca.pem", "ca.key", "server.pem", "server.key", "aggregator.pem")


def missing(path: Path) -> str:
    path.unlink()
    return f"{path} is missing: {BACKUP}"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return damaged_words(path)


def broken(path: Path) -> str:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "?" + lines[1][1:], *lines[2:]]))
    return damaged_words(path)


def cut(path: Path) -> str:
    """Leave PEM that is whole and holds half of what it should."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[-1], ""]))
    return damaged_words(path)


def damaged_words(path: Path) -> str:
    what = "no key in PEM that can be read" if path.suffix == ".key" else "no certificate in PEM"
    return f"{path} is damaged: it holds {what}; {BACKUP}"


def serve(folder: FleetFolder) -> None:
    """Do what `aggregator serve` does before its broker comes in."""
    folder.renew(datetime.now(timezone.utc))
    with EnrolmentServer(folder, EventLog(as_json=True, stream=io.StringIO()), port=0):
        folder.tls.context()


@pytest.mark.parametrize("damage", [missing, empty, broken, cut])
@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_with_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], str]
) -> None:
    folder = make_folder(tmp_path / "fleet")
    words = damage(folder.path / name)
    with pytest.raises(FolderError) as told:
        serve(folder)
    assert str(told.value) == words


@pytest.mark.parametrize("name", ["ca", "server"])
def test_a_key_of_another_fleet_is_named(tmp_path: Path, name: str) -> None:
    folder, other = make_folder(tmp_path / "fleet"), make_folder(tmp_path / "other")
    shutil.copy(other.path / f"{name}.key", folder.path)
    with pytest.raises(FolderError, match=rf"{name}\.key is not the key of {name}\.pem beside it"):
        serve(folder)


@pytest.mark.parametrize("damage", [missing, broken, shutil.copy])
def test_the_aggregators_own_key_is_named(
    tmp_path: Path, damage: Callable[[Path, Path], object]
) -> None:
    folder = make_folder(tmp_path / "fleet")
    key = folder.path / "aggregator.key"
    if damage is shutil.copy:
        shutil.copy(make_folder(tmp_path / "other").path / "aggregator.key", key)
    else:
        damage(key)  # type: ignore[call-arg]
    with pytest.raises(CertificateUnusable, match=rf"{key} can't be used for TLS: .*backup"):
        serve(folder)


@pytest.mark.parametrize("damage", [missing, empty, broken, cut])
@pytest.mark.parametrize("name", ["ca.pem", "device.pem", "tls.key"])
def test_what_a_device_has_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], str]
) -> None:
    """An empty CA's file is as bad as none: OpenSSL would go by the system's authorities."""
    folder = make_folder(tmp_path / "fleet")
    files = folder.tls
    own = TlsFiles(tmp_path / "ca.pem", tmp_path / "device.pem", tmp_path / "tls.key")
    for here, there in ((own.ca, files.ca), (own.certificate, files.certificate)):
        shutil.copy(there, here)
    shutil.copy(files.key, own.key)
    own.context()
    damage(tmp_path / name)
    with pytest.raises(CertificateUnusable, match=f"{name} can't be used for TLS: ") as told:
        own.context()
    assert str(told.value).endswith("or join again with a new token")
    assert "http" not in str(told.value) and "_ssl" not in str(told.value)


def test_without_the_cas_key_nobody_is_promised_to_be_let_in(tmp_path: Path) -> None:
    folder, now = make_folder(tmp_path / "fleet"), datetime.now(timezone.utc)
    (folder.path / "ca.key").unlink()
    with pytest.raises(FolderError, match=r"ca\.key is missing"):
        folder.issue_token("kitchen", hours=1, now=now)
    assert folder.renew(now) == [], "rounds need it not"


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    folder, job = make_folder(tmp_path / "fleet"), write_job(tmp_path / "job.json")
    serving = ("aggregator", "serve", job, "--dir", folder.path, "--enroll-port")
    port = folder.settings.enrol_port
    words = missing(folder.server_key)
    ended = command(*serving, port, home=tmp_path)
    assert (ended.returncode, ended.stderr) == (1, f"error: {words}\n")
    words = broken(folder.path / "ca.pem")
    ended = command(*serving, 0, home=tmp_path)
    assert (ended.returncode, ended.stderr) == (1, f"error: {words}\n")
    shutil.rmtree(folder.path / "state")
    ended = command(*serving, port, home=tmp_path)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert f"can't serve {folder.path}" in ended.stderr


def test_a_full_disk_is_called_one(disk: Path, tmp_path: Path) -> None:
    folder, job = make_folder(disk / "fleet"), write_job(tmp_path / "job.json")
    ballast = fill(disk)
    for arguments in (("revoke", "kitchen"), ("enroll", "kitchen"), ("serve", job)):
        ended = command("aggregator", *arguments, "--dir", folder.path, home=tmp_path)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
        assert "devices.sqlite: the disk is full; make room there" in ended.stderr
    ballast.unlink()
    ended = command("aggregator", "enroll", "kitchen", "--dir", folder.path, home=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_a_list_that_can_not_be_written_leaves_the_device_out_for_the_aggregator(
    tmp_path: Path,
) -> None:
    folder, now = make_folder(tmp_path / "fleet"), datetime.now(timezone.utc)
    folder.issue_token("kitchen", hours=1, now=now)
    (folder.path / "crl.pem.tmp").mkdir()
    words = r"kitchen is out for the aggregator, .*can't write .*crl\.pem: .*; then revoke it again"
    with pytest.raises(FolderError, match=words):
        folder.revoke("kitchen", now)
    assert not folder.registry().known("kitchen")
