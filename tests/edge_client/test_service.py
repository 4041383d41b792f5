"""A device as a systemd service: its units as systemd reads them, and what it tells systemd."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client import install as installing
from edge_client.errors import ConfigError
from edge_client.policy.owner import Policy
from edge_client.unit import NAME, Service, device_unit
from protocol import notify as notifying
from protocol.notify import alive, notify

EXPOSURE = 3.0
"""systemd's own measure, 0 to 10, of what a service could do if it were broken into."""


def edge_client(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_client", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "my $notes of 100%"
    folder.mkdir()
    (folder / "a.txt").write_text("what I have written")
    return tmp_path


def analyze(*arguments: object) -> str:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = ["systemd-analyze", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("kind", ["--user", "--system"])
def test_systemd_takes_the_units(home: Path, kind: str) -> None:
    made = edge_client(
        "install-service", kind, "--data", home / "my $notes of 100%", "--memory-cap", 800,
        "--exit-when-done",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (unit,) = home.rglob(NAME)
    assert (str(unit) in made.stdout) == (kind == "--system")
    said = analyze("verify", "--man=no", unit)
    assert [line for line in said.splitlines() if NAME in line] == []
    text = unit.read_text()
    for line in ("Type=notify", "KillMode=mixed", "OOMPolicy=continue", "MemoryMax=1184M"):
        assert line in text.splitlines()
    assert f'"{home}/my $$notes of 100%%"' in text


def test_the_systems_unit_exposes_little(home: Path, tmp_path: Path) -> None:
    service = Service(["run"], [tmp_path], Policy(), None, user="nobody")
    (tmp_path / NAME).write_text(device_unit(service))
    said = analyze("security", "--offline=true", "--no-pager", tmp_path / NAME)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    if found is None:
        pytest.skip(f"this systemd-analyze does not read files: {said[-200:]}")
    assert float(found[1]) <= EXPOSURE


def test_a_users_unit_has_only_what_a_user_may() -> None:
    service = Service(["run"], [], Policy(nice=15, cpu_weight=5), None)
    text = device_unit(service)
    for word in ("Protect", "Private", "User=", "CapabilityBoundingSet", "ReadWritePaths"):
        assert word not in text
    assert "NoNewPrivileges=yes" in text and "SystemCallFilter=@system-service" in text
    assert "Nice=15" in text and "CPUWeight=5" in text and "MemoryMax" not in text


def test_what_the_policy_says_stands_in_the_unit_though_it_is_nothing() -> None:
    unsaid = device_unit(Service(["run"], [], Policy(), None))
    assert "Nice=10" in unsaid and "IOSchedulingClass=idle" in unsaid
    said = device_unit(Service(["run"], [], Policy(nice=0, io="normal"), None))
    assert "Nice=0" in said and "IOSchedulingClass=best-effort" in said


@pytest.mark.parametrize("kind", ["--user", "--system"])
def test_the_installing_shells_models_and_proxies_are_the_services(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for name in ("HTTP_PROXY", "https_proxy", "no_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HOME", "my models of 100%")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("HTTP_PROXY", 'http://me:s"e$c`r\\et@proxy.example:3128')
    arguments = ("install-service", kind, "--data", home / "my $notes of 100%", "--state", "st ate")
    printed = edge_client(*arguments, "--print")
    assert 's"e' not in printed.stdout + printed.stderr
    assert "put HTTP_PROXY into" in printed.stderr and not list(home.rglob("service.env"))
    assert edge_client(*arguments).returncode == 0
    (unit,) = home.rglob(NAME)
    lines = unit.read_text().splitlines()
    assert f'Environment="HF_HOME={home}/my models of 100%%"' in lines
    assert 'Environment="HF_HUB_OFFLINE=1"' in lines
    assert 'Environment="https_proxy=http://proxy.example:3128"' in lines
    secrets = home / "st ate" / "service.env"
    assert f"EnvironmentFile={secrets}" in lines
    assert "proxy.example:3128" not in "".join(line for line in lines if "HTTP_PROXY" in line)
    assert secrets.stat().st_mode & 0o077 == 0
    written = 'HTTP_PROXY="http://me:s\\"e\\$c\\`r\\\\et@proxy.example:3128"\n'
    assert secrets.read_text() == written
    said = analyze("verify", "--man=no", unit)
    assert [line for line in said.splitlines() if NAME in line] == []


def test_print_writes_nothing_and_mistakes_come_now(home: Path) -> None:
    data = home / "my $notes of 100%"
    printed = edge_client("install-service", "--print", "--data", data)
    assert printed.stdout.startswith("[Unit]") and list(home.rglob(NAME)) == []
    nowhere = edge_client("install-service", "--data", home / "nowhere")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (1, 1)
    assert "there is no file or folder" in nowhere.stderr
    unknown = edge_client("install-service", "--data", data, "--colour", "red")
    assert unknown.returncode == 2 and "No such option: --colour" in unknown.stderr
    assert "install-service [OPTIONS]" in unknown.stderr and "run [OPTIONS]" not in unknown.stderr


def test_a_second_device_leaves_the_firsts_unit_as_it_is(home: Path) -> None:
    units = home / "XDG_CONFIG_HOME" / "systemd" / "user"
    install = ("install-service", "--data", home / "my $notes of 100%")
    assert edge_client(*install, "--threads", 2).returncode == 0
    first = (units / NAME).read_text()
    refused = edge_client(*install, "--state", home / "other")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert f"is the unit of the device with its state in {home}" in refused.stderr
    assert "--name" in refused.stderr and (units / NAME).read_text() == first
    second = edge_client(*install, "--name", "second", "--state", home / "other")
    assert "enable --now tunefleet-device-second.service" in second.stdout
    assert str(home / "other") in (units / "tunefleet-device-second.service").read_text()
    assert (units / NAME).read_text() == first
    assert edge_client(*install).returncode == 0, "its own it may change"
    assert (units / NAME).read_text() != first and not list(units.glob("*.tmp"))


def test_a_system_unit_of_another_device_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "SYSTEM_UNITS", tmp_path)
    for state in (tmp_path / "first", tmp_path / "second"):
        service = Service(
            ["run", "--state", str(state)], [state, tmp_path / "cache"], Policy(), None, user="me"
        )
        if state.name == "second":
            with pytest.raises(ConfigError, match=r"with its state in .*first; give this"):
                installing.install(service, state)
            assert not state.exists()
        else:
            installing.install(service, state)
            shutil.copy(state / NAME, tmp_path / NAME)


def test_a_system_service_may_write_where_models_are_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    data = home / "my $notes of 100%"
    printed = edge_client("install-service", "--system", "--print", "--data", data)
    (writes,) = (w for w in printed.stdout.splitlines() if w.startswith("ReadWritePaths="))
    for name, folder in (
        ("HF_HUB_CACHE", "hub"), ("HF_HOME", "HF_HOME"), ("XDG_CACHE_HOME", "XDG_CACHE_HOME")
    ):  # fmt: skip
        assert f'Environment="{name}={home / folder}"' in printed.stdout
        assert f'"{home / folder}"' in writes


def test_what_private_tmp_hides_is_said(tmp_path: Path) -> None:
    shown, hidden = Path("/srv/notes"), Path("/var/tmp/../tmp/notes")
    for user, data, said in (("me", shown, ""), ("me", hidden, "PrivateTmp"), ("", hidden, "")):
        service = Service(["run"], [Path("/srv/state")], Policy(), None, user=user)
        found = installing.not_found_by(service, {"data": [shown, data], "threads": 2})
        assert said in found and bool(found) == bool(said)
    state = Service(["run"], [Path("/tmp/state")], Policy(), None, user="me")
    assert installing.not_found_by(state, {}).startswith("/tmp/state is below")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--memory-cap", "-3", "--memory-cap must be from 1"),
        ("--memory-cap", "0", "--memory-cap must be from 1"),
        ("--checkpoint-every", "-4", "--checkpoint-every must be"),
        ("--private-rank", "99999", "--private-rank must be"),
        ("--threads", "99999", "--threads must be"),
        ("--job", "BAD NAME", "--job must be a name"),
        ("--profile", "nope", "nope"),
        ("--model", "nonexist/none", "'nonexist/none'"),
    ],
)
def test_what_run_refuses_makes_no_unit(
    home: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, said: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = home / "my $notes of 100%"
    refused = edge_client("install-service", "--data", data, option, value)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert said in refused.stderr and list(home.rglob(NAME)) == []


def test_a_backend_is_written_as_it_is_given(home: Path) -> None:
    data = home / "my $notes of 100%"
    printed = edge_client("install-service", "--print", "--data", data, "--backend", "torch")
    assert '"--backend" "torch"' in printed.stdout


@pytest.mark.parametrize("abstract", [False, True])
def test_messages_to_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    notify(READY="1")  # nobody to hear it: no matter
    name = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify(READY="1", STATUS="waiting: for the night")
        assert systemd.recv(1000) == b"READY=1\nSTATUS=waiting: for the night"
        monkeypatch.setattr(notifying, "_last_alive", float("-inf"))
        alive()
        alive()  # as often as it likes: it is said now and then
        assert systemd.recv(1000) == b"WATCHDOG=1"
        systemd.setblocking(False)
        with pytest.raises(BlockingIOError):
            systemd.recv(1000)
    notify(READY="1")  # systemd has gone
