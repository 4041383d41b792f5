"""How fast the live page is with a fleet of thousands, and what it costs the aggregator.

    python -m benchmarks.page [--quick] [--devices 5000] [--rounds 100]

A state as such a fleet leaves it is served by the page, in a process of its own, and looked at from
outside: first and later loads, the time from a device's going away to the event that says so, and,
where Chromium is there, the same in a browser with the longest time that its page was frozen. What
the page costs: memory, and processor time while somebody watches a fleet in which every second some
devices change. Writes runs/bench/page.json.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.claims import Claim, write_claims
from benchmarks.made_fleet import JOB, made_fleet

LOADS, AWAYS = 9, 5
CHANGING = 20
"""Devices that change each second while somebody watches."""
SET_ONLINE = "UPDATE devices SET status = json_set(status, '$.online', json(?)) WHERE name = ?"
"""What a device's last will comes to in the store."""
MIB = 2**20
PATH = f"/jobs/{JOB}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--watch", type=float, default=20.0, help="seconds that are watched")
    parser.add_argument("--quick", action="store_true", help="500 devices, 10 rounds, 5 seconds")
    asked = parser.parse_args()
    devices, rounds, watch_s = asked.devices, asked.rounds, asked.watch
    if asked.quick:
        devices, rounds, watch_s = 500, 10, 5.0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        made_fleet(root / JOB, devices, rounds)
        with _served(root) as (port, process):
            found = _measure(root / JOB / "store.sqlite", port, process, watch_s)
    found |= {"devices": devices, "rounds": rounds}
    write_claims("page", _claims(found), **found)


def _claims(found: dict[str, Any]) -> list[Claim]:
    devices = f"{found['devices']:,} devices, {found['rounds']} rounds"
    claims = [
        _below(f"first load after a start, s; {devices}", found["first_load_s"], 1.0),
        _below("later loads, median, s", found["load_s"], 1.0),
        _below("a device's going away is sent, slowest, s", found["away_s"], 3.0),
        _below("memory of the page's process, MiB", found["resident_mib"], 200.0),
        _below("processor time while one watches, share of a core", found["watch_share"], 0.25),
    ]
    if "browser_load_s" in found:
        claims += [
            _below("loaded and drawn in Chromium, median, s", found["browser_load_s"], 1.0),
            _below("a device's going away is seen in Chromium, s", found["browser_away_s"], 3.0),
            _below("longest time the browser was frozen, s", found["browser_frozen_s"], 0.2),
        ]
    return claims


def _below(claim: str, value: float, limit: float) -> Claim:
    return Claim(claim, round(value, 3), f"< {limit:g}", value < limit)


def _measure(store: Path, port: int, process: psutil.Process, watch_s: float) -> dict[str, Any]:
    first = _load(port)
    loads = [_load(port) for _ in range(LOADS)]
    found: dict[str, Any] = {
        "first_load_s": first[0],
        "load_s": median(seconds for seconds, _ in loads),
        "page_bytes": loads[0][1],
        "away_s": max(_away(store, port, n) for n in range(AWAYS)),
        "watch_share": _watched(store, port, process, watch_s),
    }
    if (chromium := shutil.which("chromium")) is not None:
        found |= _in_browser(chromium, store, port, watch_s)
    return found | {"resident_mib": process.memory_info().rss / MIB}


def _load(port: int) -> tuple[float, int]:
    """Return how long a page takes to come, in seconds, and its bytes."""
    started = time.perf_counter()
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request("GET", PATH)
    data = link.getresponse().read()
    link.close()
    return time.perf_counter() - started, len(data)


@contextmanager
def _events(port: int) -> Iterator[http.client.HTTPResponse]:
    """Watch a page; all that there is at first has come."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request("GET", PATH, headers={"accept": "text/event-stream"})
    stream = link.getresponse()
    while not stream.readline().startswith(b"data:"):
        pass
    yield stream
    link.close()


def _set_online(store: Path, name: str, online: bool) -> None:
    with sqlite3.connect(store, timeout=30) as db:
        db.execute(SET_ONLINE, ["true" if online else "false", name])
    db.close()


def _away(store: Path, port: int, number: int) -> float:
    """Return how long it takes until it is sent that a device is away, in seconds."""
    name = f"device-{number:04d}"
    _set_online(store, name, True)
    time.sleep(1.5)
    with _events(port) as stream:
        time.sleep(0.37 * number)  # anywhere between two looks at the store
        started = time.perf_counter()
        _set_online(store, name, False)
        row = f'data-key=\\"{name}\\"'.encode()
        while True:
            line = stream.readline()
            at = line.find(row)
            if at >= 0 and b"offline" in line[at : at + 400]:
                return time.perf_counter() - started


def _watched(store: Path, port: int, process: psutil.Process, seconds: float) -> float:
    """Return the share of a core that the page takes while one watches and devices change."""
    with _events(port) as stream:
        ended = threading.Event()
        changing = threading.Thread(target=_change, args=(store, ended))
        reading = threading.Thread(target=_drain, args=(stream, ended), daemon=True)
        before, started = _processor_s(process), time.perf_counter()
        changing.start()
        reading.start()
        time.sleep(seconds)
        taken = (_processor_s(process) - before) / (time.perf_counter() - started)
        ended.set()
        changing.join()
        reading.join(10)  # something comes every few seconds
    return taken


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _change(store: Path, ended: threading.Event) -> None:
    turn = 0
    while not ended.wait(1.0 / CHANGING):
        turn += 1
        _set_online(store, f"device-{turn * 7 % 50:04d}", turn % 3 > 0)


def _drain(stream: http.client.HTTPResponse, ended: threading.Event) -> None:
    while not ended.is_set() and stream.readline():
        pass


def _in_browser(chromium: str, store: Path, port: int, seconds: float) -> dict[str, float]:
    """Return the same in a browser, whose page tells how long it was ever frozen."""
    from playwright.sync_api import sync_playwright

    url = f"http://localhost:{port}{PATH}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        loads = []
        for _ in range(LOADS):
            started = time.perf_counter()
            page.goto(url, wait_until="load")
            loads.append(time.perf_counter() - started)
        page.wait_for_selector('#live[data-state="on"]')
        page.wait_for_timeout(1500)
        page.evaluate(
            "() => { window.frozen = 0; new PerformanceObserver((list) => { for (const task of "
            "list.getEntries()) window.frozen = Math.max(window.frozen, task.duration); })"
            ".observe({ type: 'longtask' }); }"
        )
        _set_online(store, "device-0003", True)
        page.wait_for_timeout(2500)
        started = time.perf_counter()
        _set_online(store, "device-0003", False)
        page.wait_for_selector('tr[data-key="device-0003"] .s-offline')
        away_s = time.perf_counter() - started
        ended = threading.Event()
        changing = threading.Thread(target=_change, args=(store, ended))
        changing.start()
        page.wait_for_timeout(1000 * seconds / 2)
        frozen_s = page.evaluate("window.frozen") / 1000
        ended.set()
        changing.join()
        browser.close()
    return {
        "browser_load_s": median(loads),
        "browser_away_s": away_s,
        "browser_frozen_s": frozen_s,
    }


@contextmanager
def _served(root: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Serve the page in a process of its own, which is what is measured."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(root, there), daemon=True)
    process.start()
    port: int = here.recv()
    time.sleep(WARM_S)
    try:
        yield port, psutil.Process(process.pid)
    finally:
        here.send("end")
        process.join(10)


WARM_S = 8.0
"""What the page reads of the past when it starts, it reads before anybody asks."""


def _serve(root: Path, told: Connection) -> None:
    from aggregator.metrics import expose
    from aggregator.page.app import Served
    from aggregator.page.reader import Reader
    from aggregator.page.server import PageServer, Where
    from protocol.events import EventLog

    with (
        Reader(root) as reader,
        PageServer(
            Served(reader, metrics=expose), Where(port=0), EventLog(as_json=False)
        ) as server,
    ):
        told.send(server.port)
        told.recv()


if __name__ == "__main__":
    main()
