"""Who may read and act, tried from outside: names, origins, tokens, sessions, TLS."""

from __future__ import annotations

import http.client
import io
import json
import os
import select
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aggregator.cli import app
from aggregator.enrol.create import create_fleet
from aggregator.enrol.folder import FleetSettings
from aggregator.enrol.server import EnrolmentServer
from aggregator.errors import ConfigError
from aggregator.page.app import Served
from aggregator.page.guard import COOKIE, SESSION_S, SESSIONS, Sessions, check_exposure
from aggregator.page.opening import check_page, make_token, read_token
from aggregator.page.reader import Reader
from aggregator.page.server import CONNECTIONS, PageServer, Where
from aggregator.settings import PageSettings
from aggregator.web import Certificate
from benchmarks.made_fleet import made_fleet
from protocol.events import EventLog
from tests.aggregator.page.site import ACTION, Said, Site, running_page

TOKEN = "a-token-of-more-than-sixteen-characters"
PAUSE = "/api/v1/jobs/notes/pause"
READ = ("/", "/jobs/notes", "/api/v1/fleet", "/metrics", "/api/v1/openapi.json")


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("states")
    made_fleet(root / "notes", devices=3, rounds=2)
    return root


@pytest.fixture(scope="module")
def site(states: Path) -> Iterator[Site]:
    with running_page(states) as site:
        yield site


@pytest.fixture(scope="module")
def guarded(states: Path) -> Iterator[Site]:
    with running_page(states, token=TOKEN, hosts=None) as site:
        yield site


def test_on_loopback_everything_can_be_read(site: Site) -> None:
    for path in READ:
        assert site.ask(path).status in (200, 303)


def test_a_page_answers_to_this_computers_names_alone(site: Site) -> None:
    """So that a name that leads here, from another site's page, reads nothing (DNS rebinding)."""
    assert site.ask("/api/v1/fleet", host="tunefleet.example").status == 421
    assert site.ask("/api/v1/fleet", host=f"localhost:{site.port}").status == 200
    assert site.ask("/api/v1/fleet", host=f"[::1]:{site.port}").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/json"},
        {**ACTION, "origin": "https://elsewhere.example"},
        {**ACTION, "origin": "null"},
        {**ACTION, "sec-fetch-site": "cross-site"},
        {**ACTION, "sec-fetch-site": "same-site"},
        {"x-tunefleet": "something"},
    ],
)
def test_another_sites_page_changes_nothing(site: Site, headers: dict[str, str]) -> None:
    answer = site.ask(PAUSE, "POST", {}, **headers)
    assert answer.status == 403
    assert "access-control-allow-origin" not in answer.headers


def test_what_is_sent_as_an_action_from_here_is_heard(site: Site) -> None:
    """Nobody serves this state: the aggregator is asked for, and is not there."""
    origin = f"http://127.0.0.1:{site.port}"
    answer = site.act(PAUSE, origin=origin, **{"sec-fetch-site": "same-origin"})
    assert answer.status == 503
    assert "no aggregator serves" in answer.json()["detail"]


def test_nothing_is_done_by_get(site: Site) -> None:
    paths = site.ask("/api/v1/openapi.json").json()["paths"]
    acting = [path for path, verbs in paths.items() if "post" in verbs]
    assert len(acting) >= 6
    for path in acting:
        if path != "/api/v1/session":
            assert "get" not in paths[path]
        told = path.format(job="notes", device="kitchen")
        assert site.ask(told, **ACTION).status in (404, 405)


def test_browsers_are_told_to_load_nothing_from_elsewhere(site: Site) -> None:
    for path in ("/jobs/notes", "/static/page.js", "/api/v1/fleet", "/nothing"):
        headers = site.ask(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert site.ask("/jobs/notes").headers["cache-control"] == "no-store"


def test_another_sites_page_makes_this_one_do_no_work(site: Site) -> None:
    """Its answer would not be shown there, but an archive is made for it all the same."""
    adapter = "/api/v1/jobs/notes/versions/3/adapter"
    fetched = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "image"}
    assert site.ask(adapter, **fetched).status == 403
    assert site.ask("/jobs/notes", **{**fetched, "sec-fetch-dest": "iframe"}).status == 403
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    assert site.ask("/jobs/notes", **followed).status == 200


def test_a_body_without_end_is_refused_before_it_is_in_memory(guarded: Site) -> None:
    """Also of somebody without a token, who may send one to be let in."""
    head = "POST /api/v1/session HTTP/1.1\r\nhost: here\r\nx-tunefleet: action\r\n"
    head += "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (1 << 16, b" " * (1 << 16))
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=20) as link:
        link.sendall(head.encode())
        said, sent = b"", 0
        with suppress(ConnectionError):
            while not said and sent < 500:
                link.sendall(chunk)
                sent += 1
                if select.select([link], [], [], 0.05)[0]:
                    said = link.recv(4096)
        assert said.startswith(b"HTTP/1.1 413 "), said
        assert sent < 20
    assert guarded.act("/api/v1/session", {"token": "x" * 100_000}).status == 413
    assert guarded.act("/api/v1/session", {"token": TOKEN}).status == 200


def test_connections_that_say_nothing_are_counted(states: Path) -> None:
    """Each has a file descriptor, of which the aggregator has need itself."""
    with running_page(states) as site, ExitStack() as stack:
        before = open_sockets()
        for _ in range(CONNECTIONS + 50):
            link = socket.create_connection(("127.0.0.1", site.port), timeout=20)
            stack.enter_context(link)
            link.sendall(b"GET /")
        taken = open_sockets() - before - (CONNECTIONS + 50)
        assert taken <= CONNECTIONS + 1  # one may just be on its way out
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            site.ask("/health/live")
        stack.close()
        assert until_answered(site).status == 200


def open_sockets() -> int:
    """Return how many sockets this process has open; its page opens and closes files meanwhile."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).split("/")[-1].startswith("socket:") for link in links)


def until_answered(site: Site) -> Said:
    """Return what the page says once it has seen that the connections have ended."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return site.ask("/health/live")
        except (ConnectionError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_each_server_tells_of_its_own_requests_alone(states: Path, tmp_path: Path) -> None:
    """Enrolment and the page have one library, which has one log."""
    told = io.StringIO()
    events = EventLog(as_json=True, stream=told)
    now = datetime.now(timezone.utc)
    fleet = create_fleet(tmp_path / "fleet", FleetSettings(hosts=["localhost"]), now)
    with (
        Reader(states) as reader,
        PageServer(Served(reader), Where(port=0), events) as page,
        EnrolmentServer(fleet, events, port=0),
        socket.create_connection(("127.0.0.1", page.port), timeout=20) as link,
    ):
        link.sendall(b"\x16\x03 no HTTP\r\n\r\n")
        assert link.recv(100)
    (event,) = map(json.loads, told.getvalue().splitlines())
    assert (event["event"], event["reason"]) == ("page", "Invalid HTTP request received.")


def test_with_a_token_nothing_is_told_without_it(guarded: Site) -> None:
    for path in READ:
        assert guarded.ask(path).status == 401
        wrong = {"authorization": "Bearer something else altogether"}
        assert guarded.ask(path, **wrong).status == 401
        assert guarded.ask(path, authorization=f"Bearer {TOKEN}").status in (200, 303)
    to_page = guarded.ask("/jobs/notes", accept="text/html")
    assert (to_page.status, to_page.headers["location"]) == (303, "/login")
    for path in ("/login", "/static/page.css", "/health/live"):
        assert guarded.ask(path).status == 200


def test_a_program_with_the_token_acts_without_the_header(guarded: Site) -> None:
    assert guarded.ask(PAUSE, "POST", {}, authorization=f"Bearer {TOKEN}").status == 503
    assert guarded.act(PAUSE).status == 401


def test_a_browser_trades_the_token_for_a_cookie(guarded: Site) -> None:
    assert guarded.act("/api/v1/session", {"token": "no such token here"}).status == 403
    answer = guarded.act("/api/v1/session", {"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    named = cookie.split(";")[0]
    assert named.startswith(COOKIE) and TOKEN not in named
    assert guarded.ask("/api/v1/fleet", cookie=named).status == 200
    assert guarded.act(PAUSE, cookie=named).status == 503
    assert guarded.ask(PAUSE, "POST", {}, cookie=named).status == 403, "the cookie alone acts not"
    ended = guarded.ask("/api/v1/session", "DELETE", cookie=named, **ACTION)
    assert ended.status == 200
    assert guarded.ask("/api/v1/fleet", cookie=named).status == 401


def test_a_session_ends_and_the_oldest_makes_room() -> None:
    now = 0.0
    sessions = Sessions(lambda: now)
    first = sessions.begin()
    others = [sessions.begin() for _ in range(SESSIONS)]
    assert not sessions.knows(first)
    assert all(map(sessions.knows, others))
    now = SESSION_S + 1
    assert not any(map(sessions.knows, others))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "fleet.example"])
def test_beyond_this_computer_it_needs_a_token_and_tls(host: str) -> None:
    for token, encrypted in (("", False), ("", True), (TOKEN, False)):
        with pytest.raises(ConfigError, match="open to the network"):
            check_exposure(host, token=token, encrypted=encrypted)
    check_exposure(host, token=TOKEN, encrypted=True)


def test_a_page_for_others_without_a_token_does_not_start(states: Path) -> None:
    with Reader(states) as reader, pytest.raises(ConfigError, match=r"a token .* and TLS"):
        PageServer(Served(reader), Where("0.0.0.0", 0), EventLog(as_json=True))


def test_the_command_makes_the_fleets_token_and_tells_it_again(tmp_path: Path) -> None:
    now = datetime.now(timezone.utc)
    fleet = create_fleet(tmp_path / "fleet", FleetSettings(hosts=["fleet.example"]), now)
    command = ["page-token", "--dir", str(fleet.path)]
    first, again = (CliRunner().invoke(app, command) for _ in range(2))
    assert first.exit_code == 0, first.output
    token = first.output.strip()
    assert again.output.strip() == token == read_token(fleet.path / "page.token")
    assert CliRunner().invoke(app, ["page-token"]).exit_code != 0


def test_a_short_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="16 at least"):
        check_exposure("127.0.0.1", token="password", encrypted=False)
    check_exposure("::1", token="", encrypted=False)


def test_a_token_is_made_once_for_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "page.token"
    token = make_token(file)
    assert len(token) >= 32 and make_token(file) == token == read_token(file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_token(file)
    with pytest.raises(ConfigError, match="page-token"):
        read_token(tmp_path / "none")


def test_a_certificate_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    now = datetime.now(timezone.utc)
    fleet = create_fleet(tmp_path / "fleet", FleetSettings(hosts=["fleet.example"]), now)
    good, key = fleet.server_certificate, fleet.server_key
    none, text = tmp_path / "none.pem", tmp_path / "text.pem"
    text.write_text("no PEM")
    for certificate, own, said in (
        (good, None, "name both"),
        (None, key, "name both"),
        (none, key, "No such file or directory: .*none.pem"),
        (good, tmp_path, "Is a directory"),
        (text, key, "to be a certificate and the key that belongs to it"),
        (good, fleet.path / "ca.key", "to be a certificate and the key"),
    ):
        settings = PageSettings(port=0, certificate=certificate, certificate_key=own)
        with pytest.raises(ConfigError, match=said):
            check_page(settings, None)
    assert check_page(PageSettings(port=0, certificate=good, certificate_key=key), None) == (
        "",
        Certificate(good, key),
    )


def test_over_tls_with_the_fleets_certificate(states: Path, tmp_path: Path) -> None:
    now = datetime.now(timezone.utc)
    fleet = create_fleet(tmp_path / "fleet", FleetSettings(hosts=["fleet.example"]), now)
    where = Where("127.0.0.1", 0, Certificate(fleet.server_certificate, fleet.server_key))
    trusting = ssl.create_default_context(cafile=str(fleet.path / "ca.pem"))
    with running_page(states, where, token=TOKEN, hosts=None, encrypted=True) as plain:
        site = Site(plain.port, context=trusting)
        assert site.ask("/api/v1/fleet").status == 401
        cookie = site.act("/api/v1/session", {"token": TOKEN}).headers["set-cookie"]
        assert "Secure" in cookie.split("; ")
