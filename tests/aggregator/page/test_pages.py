"""What the pages say is what the state has: with no, few and many devices."""

from __future__ import annotations

import asyncio
import gc
import http.client
import io
import json
import os
import re
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from starlette.responses import StreamingResponse

from aggregator.export import export_adapter
from aggregator.page.asked import PER_PAGE, Asked
from aggregator.page.live import Source, Watchers
from aggregator.page.page import Page as Made
from aggregator.view import StateView
from benchmarks.made_fleet import made_fleet
from tests.aggregator.page.site import Site, running_page

FLEETS = {"none": (0, 0), "few": (6, 4), "many": (400, 3)}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("states")
    for name, (devices, rounds) in FLEETS.items():
        made_fleet(root / name / "notes", devices, rounds, trust=name == "few")
    return root


@pytest.fixture(scope="module", params=FLEETS)
def fleet(request: pytest.FixtureRequest, states: Path) -> Iterator[tuple[str, Site, StateView]]:
    name = request.param
    with running_page(states / name) as site, StateView(states / name / "notes") as view:
        yield name, site, view


class Page(HTMLParser):
    """The texts of a page's elements, and that every one that is opened is closed."""

    VOID = frozenset({"meta", "link", "input", "br", "hr", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, "every element is closed"
        assert len(set(self.ids)) == len(self.ids), "an id is there once"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        fields = dict(attrs)
        assert "style" not in fields and not [a for a in fields if a.startswith("on")]
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [fields["href"] or ""] if tag == "a" and "href" in fields else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if words := " ".join(data.split()):
            self.text.append(words)

    def __contains__(self, words: str) -> bool:
        return words in " ".join(self.text)


def test_a_jobs_page_says_what_the_state_has(fleet: tuple[str, Site, StateView]) -> None:
    name, site, view = fleet
    page, job = Page(site.ask("/jobs/notes").text), view.job()
    assert f"of {job.devices.known:,}, {job.devices.ready:,} ready" in page
    if not job.devices.known:
        assert "No device has been heard of yet" in page
        return
    for state, number in job.devices.by_state.items():
        assert f"{state} {number:,}" in page
    shown = view.devices(limit=PER_PAGE)
    for device in shown:
        assert device.name in page
    rounds = view.rounds(limit=200)
    loss = next(one.loss for one in rounds if one.loss is not None)
    assert f"{loss:.3f}" in page
    assert ("Who trusts whom" in page) == (name == "few")


def test_every_link_of_a_page_leads_somewhere(fleet: tuple[str, Site, StateView]) -> None:
    _, site, _ = fleet
    page = Page(site.ask("/jobs/notes").text)
    devices = [link for link in page.links if "/devices/" in link]
    for link in dict.fromkeys([*page.links]):
        if link in devices[2:]:
            continue
        path, _, place = link.partition("#")
        if path.startswith("?"):
            path = f"/jobs/notes{path}"
        elif not path:
            assert place in page.ids
            continue
        assert site.ask(path).status in (200, 303), link


def test_many_devices_come_a_page_at_a_time(states: Path) -> None:
    with running_page(states / "many") as site:
        seen: list[str] = []
        for number in range(1, 9):
            page = site.ask(f"/jobs/notes?page={number}").text
            seen += re.findall(r'<tr data-key="(device-\d+)"', page)
        assert seen == [f"device-{n:04}" for n in range(400)]
        found = site.ask("/jobs/notes?search=39&state=").text
        rows = re.findall(r'<tr data-key="(device-\d+)"', found)
        assert rows == [f"device-{n:04}" for n in range(400) if "39" in f"{n:04}"]


def test_states_filter_the_list_and_the_map_has_all(states: Path) -> None:
    with running_page(states / "many") as site, StateView(states / "many" / "notes") as view:
        counts = view.counts()
        waiting = site.ask("/api/v1/jobs/notes/devices?state=waiting&limit=1000").json()
        assert waiting["total"] == len(waiting["devices"]) == counts.by_state["waiting"]
        (drawn,) = re.findall(r'data-map="(\w+)"', site.ask("/jobs/notes").text)
        assert len(drawn) == 400
        assert drawn.count("o") == counts.by_state["offline"]
        at = site.ask("/jobs/notes/devices/at/17")
        assert at.headers["location"] == "/jobs/notes/devices/device-0017"
        assert site.ask("/jobs/notes/devices/at/4000").headers["location"] == "/jobs/notes"


def test_a_devices_page_has_its_rounds(states: Path) -> None:
    with running_page(states / "few") as site, StateView(states / "few" / "notes") as view:
        detail = view.device("device-0002")
        assert detail is not None
        page = Page(site.ask("/jobs/notes/devices/device-0002").text)
        assert detail.device.profile in page
        for one in detail.history:
            if one.loss is not None:
                assert f"{one.loss:.3f}" in page


def test_what_is_not_there_is_said_on_a_page_and_in_json(states: Path) -> None:
    with running_page(states / "few") as site:
        for path in ("/jobs/letters", "/jobs/notes/devices/attic", "/nothing"):
            answer = site.ask(path, accept="text/html")
            assert answer.status == 404
            assert "<h1>" in answer.text
        for path in ("jobs/letters", "jobs/notes/devices/attic", "jobs/notes/rounds/99"):
            answer = site.ask(f"/api/v1/{path}")
            assert answer.status == 404
            assert answer.json()["detail"]


def test_several_jobs_have_a_list(states: Path, tmp_path: Path) -> None:
    for name in ("notes", "letters"):
        made_fleet(tmp_path / name, 2, 1, name=name)
    with running_page(tmp_path) as site:
        page = Page(site.ask("/").text)
        assert {"/jobs/notes", "/jobs/letters"} <= {*page.links}
        assert "2 jobs" in page
    with running_page(states / "few") as site:
        assert site.ask("/").headers["location"] == "/jobs/notes"


def test_a_version_comes_as_the_directory_that_export_writes(states: Path, tmp_path: Path) -> None:
    export_adapter(states / "few" / "notes", tmp_path / "out", version=3)
    with running_page(states / "few") as site:
        answer = site.ask("/api/v1/jobs/notes/versions/3/adapter")
        assert answer.headers["content-disposition"] == 'attachment; filename="notes-v3.zip"'
        with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        assert site.ask("/api/v1/jobs/notes/versions/99/adapter").status == 404
    assert found == {f"notes-v3/{p.name}": p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_a_download_that_there_is_no_room_for(
    states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.write_text("a file in the place of the folder for what is temporary")
    with running_page(states / "few") as site:
        monkeypatch.setattr(tempfile, "tempdir", str(full))
        answer = site.ask("/api/v1/jobs/notes/versions/3/adapter")
    assert answer.status == 507 and "can't make the archive" in answer.json()["detail"]


def test_downloads_leave_no_file_open(states: Path) -> None:
    with running_page(states / "few") as site:
        gc.disable()  # what is left to it to close may be too much before it comes
        try:
            open_files = []
            for _ in range(6):
                assert site.ask("/api/v1/jobs/notes/versions/3/adapter").status == 200
                open_files.append(len(os.listdir("/proc/self/fd")))
        finally:
            gc.enable()
    assert open_files[-1] < open_files[0] + 3, open_files


def test_a_state_that_can_not_be_read_is_said(tmp_path: Path) -> None:
    for name in ("notes", "letters"):
        made_fleet(tmp_path / name, 2, 1, name=name)
    (tmp_path / "letters/store.sqlite").write_bytes(b"no database at all" * 100)
    with running_page(tmp_path) as site:
        home = site.ask("/")
        assert home.status == 200 and "can&#39;t read the aggregator&#39;s state" in home.text
        assert "not a database" in site.ask("/jobs/letters").text
        assert site.ask("/jobs/notes").status == 200


def test_what_devices_say_is_text_and_no_markup(tmp_path: Path) -> None:
    made_fleet(tmp_path / "notes", 2, 1)
    hostile = "<img src=x onerror=alert(1)>"
    with sqlite3.connect(tmp_path / "notes" / "store.sqlite") as db:
        db.execute(
            "UPDATE devices SET status = json_set(status, '$.detail', ?, '$.profile', ?, '$.state',"
            " 'waiting', '$.online', json('true'))",
            [hostile, hostile],
        )
    with running_page(tmp_path) as site:
        for path in ("/jobs/notes", "/jobs/notes/devices/device-0000"):
            page = site.ask(path).text
            assert "<img" not in page
            assert hostile in Page(page)


def test_what_changes_is_sent_to_who_watches(tmp_path: Path) -> None:
    """First all that there is, then what is new, and nothing else."""
    made_fleet(tmp_path / "notes", 6, 2)
    with running_page(tmp_path) as site:
        link = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
        link.request("GET", "/jobs/notes", headers={"accept": "text/event-stream"})
        stream = link.getresponse()
        first = _next_page(stream)
        assert {"head", "tiles", "fleet", "rounds", "versions"} <= {*first["fragments"]}
        with sqlite3.connect(tmp_path / "notes" / "store.sqlite") as db:
            away = "UPDATE devices SET status = json_set(status, '$.online', json('false'))"
            db.execute(f"{away} WHERE name = 'device-0000'")
        later = _next_page(stream)
        assert "offline" in later["fragments"]["fleet"]
        assert not {"rounds", "versions", "settings"} & {*later["fragments"]}
        link.close()


def test_many_who_watch_share_what_is_made(tmp_path: Path) -> None:
    """However many look, the aggregator shares its computer with one page's making."""
    made: list[str] = []

    async def page() -> Made:
        made.append("page")
        await asyncio.sleep(0.01)
        return Made("", {"head": Markup(len(made))})

    async def stamp() -> int:
        return len(made)  # it changes all the time

    async def watch() -> None:
        watchers = Watchers(every_s=0.2)
        streams = [watchers.stream(Source("/jobs/notes?", page, stamp)) for _ in range(20)]
        ending = asyncio.get_running_loop().call_later(1.0, watchers.end)
        said = await asyncio.gather(*(_read(stream) for stream in streams))
        ending.cancel()
        assert min(map(len, said)) >= 4, "each is told of changes"
        assert len(made) <= 12

    asyncio.run(watch())


async def _read(stream: StreamingResponse | None) -> list[Any]:
    assert stream is not None
    return [part async for part in stream.body_iterator]


def _next_page(stream: Any) -> dict[str, Any]:
    while not (line := stream.readline().decode()).startswith("data: "):
        pass
    found: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return found if found["fragments"] else _next_page(stream)


@pytest.mark.parametrize("page", ["-1", "0", "1e9", "²", "", "99999999999999999999"])
def test_an_address_that_makes_no_sense_is_the_first_or_an_empty_page(page: str) -> None:
    asked = Asked.read({"page": page, "order": "size", "state": "x" * 500})
    assert 1 <= asked.page <= 1_000_000
    assert asked.order == "name" and len(asked.state) <= 63
