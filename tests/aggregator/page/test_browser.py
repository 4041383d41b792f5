"""A browser on the page of a live fleet of six: Debian's Chromium, real aggregator and Mosquitto.

With TUNEFLEET_SCREENSHOTS set to a folder, pictures of what was looked at are left there.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from aggregator.page.render import loss_words
from aggregator.page.server import Where
from protocol.human import human_bytes
from protocol.transport import BrokerAddress
from tests.aggregator.page.live_fleet import LiveFleet, live_fleet
from tests.aggregator.page.site import Site, running_page
from tests.conftest import running_mosquitto

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)"),
    pytest.mark.timeout(180),
]
AWAY_S = 3.0
"""Within how long a device that goes away is shown as away; what tests of time wait for at most
is far longer, for a busy machine is no fault of the page: benchmarks/page.py measures it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    folder = tmp_path_factory.mktemp("live")
    with running_mosquitto(folder / "mosquitto") as broker, live_fleet(folder, broker) as fleet:
        yield fleet


class Looker:
    """A page in a browser, and what went wrong there."""

    def __init__(self, browser: Browser, **context: Any) -> None:
        context.setdefault("viewport", {"width": 1280, "height": 900})
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type != "log" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.context.on("request", lambda request: self.asked.append(request.url))

    def open(self, url: str) -> Page:
        self.page.goto(url)
        self.page.wait_for_selector('#live[data-state="on"]')
        return self.page

    def picture(self, name: str) -> None:
        if folder := os.environ.get("TUNEFLEET_SCREENSHOTS"):
            self.page.wait_for_timeout(300)
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def close(self) -> None:
        """End, and see that nothing went wrong and nothing was fetched from elsewhere."""
        self.context.close()
        assert self.wrong == []
        here = {"localhost", "127.0.0.1"}
        elsewhere = [u for u in self.asked if urlsplit(u).hostname not in here]
        assert [u for u in elsewhere if not u.startswith("data:")] == []


@pytest.fixture
def look(browser: Browser) -> Iterator[Callable[..., Looker]]:
    lookers: list[Looker] = []

    def make(**context: Any) -> Looker:
        lookers.append(Looker(browser, **context))
        return lookers[-1]

    yield make
    for looker in lookers:
        looker.close()


def until(holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.05)


def settled(fleet: LiveFleet, rounds: int, online: int = 5) -> None:
    """Wait until so many rounds are merged and so many devices are there, and pause the job."""
    with fleet.view() as view:
        if view.job().round <= rounds and view.job().paused is not None:
            assert fleet.site.act("/api/v1/jobs/notes/resume").status == 200
        until(lambda: view.job().round > rounds and view.job().devices.online >= online)
        if view.job().paused is None:
            assert fleet.site.act("/api/v1/jobs/notes/pause").status == 200
        seen: list[Any] = []

        def is_still() -> bool:
            seen.append(view.job())
            return len(seen) > 6 and all(one == seen[-1] for one in seen[-6:])

        until(is_still)


def text(page: Page, selector: str) -> str:
    return " ".join(page.inner_text(selector).split())


def test_numbers_on_the_page_are_the_stores(fleet: LiveFleet, look: Callable[..., Looker]) -> None:
    settled(fleet, 3, online=6)
    page = look().open(fleet.url)
    with fleet.view() as view:
        job, rounds = view.job(), view.rounds(limit=100)
        devices = view.devices()
    page.wait_for_selector("text=is paused")
    assert page.inner_text("h1") == (
        f"Round {job.round:,} of {job.rounds:,} is paused, {job.delivered} delivered"
    )
    tiles = text(page, ".tiles")
    loss = next(view.loss for view in rounds if view.loss is not None)
    for words in (
        f"Online 6 of 6, {job.devices.ready} ready",
        f"Delivered {job.delivered} quorum 1",
        f"Held-out loss {loss_words(loss)}",
        f"{human_bytes(job.up_bytes)} up, {human_bytes(job.down_bytes)} down",
    ):
        assert words in tiles
    for device in devices:
        row = text(page, f'tr[data-key="{device.name}"]')
        assert f"{human_bytes(device.up_bytes)} {human_bytes(device.down_bytes)}" in row
        assert f" {device.last_round} " in row
    page.click("summary:has-text('figures of these rounds')")
    for one in rounds[:120]:
        row = text(page, f'tr[data-key="r{one.number}"]')
        assert row.startswith(f"{one.number} {loss_words(one.loss)} {one.counted} ")


def test_a_device_that_goes_away_is_shown_as_away(
    fleet: LiveFleet, look: Callable[..., Looker]
) -> None:
    settled(fleet, 3)
    page = look().open(fleet.url)
    row = 'tr[data-key="device-5"]'
    assert "offline" not in text(page, row)
    fleet.leave("device-5")
    page.wait_for_selector(f"{row} .s-offline")
    page.wait_for_selector(".tiles:has-text('of 6, 5 ready')")


def test_actions_are_done_and_shown(fleet: LiveFleet, look: Callable[..., Looker]) -> None:
    """Resumed, a quorum changed, paused, and gone back to an older version: all by the page."""
    settled_page = look()
    page = settled_page.open(fleet.url)
    with fleet.view() as view:
        if view.job().paused is None:
            page.click("#steer button:has-text('Pause')")
        page.wait_for_selector("#steer button:has-text('Resume')")
        before = view.job()
        page.click("#steer button:has-text('Resume')")
        until(lambda: view.job().paused is None and view.job().round > before.round)
        page.fill("input[name=quorum]", "3")
        page.click("#steer button:has-text('Change')")
        page.wait_for_selector("#said[data-kind=good]:has-text('Change: ')")
        assert view.policy().quorum == 3
        page.click("#steer button:has-text('Pause')")
        page.wait_for_selector("#steer button:has-text('Resume')")
        newest = view.job().version
        page.click(f'tr[data-key="v{newest - 1}"] button:has-text("Roll back")')
        page.click("dialog button:has-text('Leave it')")
        assert view.job().version == newest, "asked first, and left"
        page.click(f'tr[data-key="v{newest - 1}"] button:has-text("Roll back")')
        page.click("dialog button.do")
        page.wait_for_selector(f'tr[data-key="v{newest + 1}"]')
        (version,) = [one for one in view.versions() if one.version == newest + 1]
        assert version.parent == newest - 1


def test_escape_leaves_everything_as_it_is(fleet: LiveFleet, look: Callable[..., Looker]) -> None:
    """Also after something else was confirmed: a dialog remembers how it was closed last."""
    settled(fleet, 3)
    page = look().open(fleet.url)
    with fleet.view() as view:
        newest = view.job().version
        button = f'tr[data-key="v{newest - 1}"] button:has-text("Roll back")'
        page.click(button)
        page.click("dialog button.do")
        page.wait_for_selector(f'tr[data-key="v{newest + 1}"]')
        page.click(button)
        page.keyboard.press("Escape")
        page.wait_for_selector("dialog", state="hidden")
        page.wait_for_timeout(1500)
        assert view.job().version == newest + 1


def test_a_form_says_what_was_changed_in_it_and_no_more(
    fleet: LiveFleet, look: Callable[..., Looker]
) -> None:
    """What another operator has changed meanwhile stays changed."""
    settled(fleet, 3)
    page = look().open(fleet.url)
    page.click("#steer button:has-text('Change')")
    page.wait_for_selector("#said[data-kind=bad]:has-text('Nothing is changed')")
    page.fill("input[name=quorum]", "4")
    page.click("#steer button:has-text('Change')")
    page.wait_for_selector("#said[data-kind=good]:has-text('quorum = 4')")
    assert fleet.site.act("/api/v1/jobs/notes/policy", {"quorum": 2}).status == 200
    until(lambda: page.input_value("input[name=quorum]") == "2")
    page.fill("input[name=deadline_s]", "1234567")
    page.evaluate("document.querySelector('input[name=quorum]').defaultValue = '5'")
    page.evaluate("document.querySelector('input[name=quorum]').value = '5'")
    page.click("#steer button:has-text('Change')")
    page.wait_for_selector("#said[data-kind=good]:has-text('deadline_s')")
    with fleet.view() as view:
        assert (view.policy().quorum, view.policy().deadline_s) == (2, 1234567)
    fleet.site.act("/api/v1/jobs/notes/policy", {"reset": ["quorum", "deadline_s"]})


def test_what_is_refused_is_said(fleet: LiveFleet, look: Callable[..., Looker]) -> None:
    settled(fleet, 3)
    looker = look()
    page = looker.open(fleet.url)
    page.evaluate("document.querySelector('input[name=quorum]').removeAttribute('min')")
    page.fill("input[name=quorum]", "0")
    page.click("#steer button:has-text('Change')")
    page.wait_for_selector("#said[data-kind=bad]:has-text('quorum')")
    assert [*filter(re.compile("422").search, looker.wrong)] == looker.wrong
    looker.wrong.clear()


def test_by_keyboard_alone(fleet: LiveFleet, look: Callable[..., Looker]) -> None:
    settled(fleet, 3)
    page = look().open(fleet.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus(".chart")
    page.keyboard.press("End")
    tip = page.inner_text("#tip").split("\n")
    with fleet.view() as view:
        assert tip[0] == f"round {view.rounds(limit=1)[0].number}"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#tip").split("\n") != tip
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    page.focus('tr[data-key="device-0"] a')
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('device-0')")


def test_what_is_being_filled_in_is_left_alone(
    fleet: LiveFleet, look: Callable[..., Looker]
) -> None:
    """The page changes under somebody's hands, and takes away neither words nor the cursor."""
    settled(fleet, 3)
    page = look().open(fleet.url)
    page.fill("input[name=deadline_s]", "77")
    page.focus("input[name=deadline_s]")
    assert fleet.site.act("/api/v1/jobs/notes/policy", {"quorum": 2}).status == 200
    page.wait_for_selector(".tiles:has-text('quorum 2')")
    assert page.input_value("input[name=deadline_s]") == "77"
    assert page.evaluate("document.activeElement.name") == "deadline_s"


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_the_page_fits_and_can_be_read(
    fleet: LiveFleet, look: Callable[..., Looker], name: str
) -> None:
    settled(fleet, 6)
    size = {"width": 390, "height": 844} if name == "phone" else {"width": 1280, "height": 900}
    scheme = "dark" if name == "dark" else "light"
    looker = look(viewport=size, color_scheme=scheme)
    for part in ("jobs/notes", "jobs/notes/devices/device-1"):
        page = looker.open(f"{fleet.url}/{part}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        looker.picture(f"{name}-{part.rpartition('/')[2]}")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 128) == (name == "dark")


def test_the_token_opens_the_page(
    tmp_path: Path, mosquitto: BrokerAddress, look: Callable[..., Looker]
) -> None:
    from benchmarks.made_fleet import made_fleet

    token = "a-token-of-more-than-sixteen-characters"
    made_fleet(tmp_path / "notes", 3, 2)
    with running_page(tmp_path, token=token, hosts=None) as site:
        looker = look()
        page = looker.page
        page.goto(address(site))
        assert page.url.endswith("/login")
        page.fill("input[name=token]", token)
        page.keyboard.press("Enter")
        page.wait_for_selector('#live[data-state="on"]')
        looker.picture("signed-in")
        page.click("text=Sign out")
        page.wait_for_url("**/login")
        page.goto(address(site))
        assert page.url.endswith("/login"), "the cookie opens nothing any more"
        looker.picture("login")


def test_a_session_that_has_ended_leads_to_the_token(
    tmp_path: Path, look: Callable[..., Looker]
) -> None:
    """As after a restart of the aggregator, which remembers no session."""
    from benchmarks.made_fleet import made_fleet

    token = "a-token-of-more-than-sixteen-characters"
    made_fleet(tmp_path / "notes", 3, 2)
    looker = look()
    page = looker.page
    with running_page(tmp_path, token=token, hosts=None) as site:
        page.goto(address(site))
        page.fill("input[name=token]", token)
        page.keyboard.press("Enter")
        page.wait_for_selector('#live[data-state="on"]')
    with running_page(tmp_path, Where(port=site.port), token=token, hosts=None):
        page.wait_for_url("**/login")
    looker.wrong.clear()  # the browser tells of a connection that was lost, and of 401


def address(site: Site) -> str:
    return f"http://localhost:{site.port}/"
