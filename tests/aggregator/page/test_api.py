"""The API: what it says of itself is so, whatever it is sent; what it is asked to do is done."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from aggregator.enrol.create import create_fleet
from aggregator.enrol.folder import FleetFolder, FleetSettings
from aggregator.enrol.registry import Registry
from aggregator.view import StateView
from protocol.broker import free_port
from protocol.enrolment import Token
from tests.aggregator.page.live_fleet import LiveFleet, live_fleet, live_job
from tests.aggregator.page.site import Site
from tests.conftest import mosquitto_of, running_mosquitto
from tests.faults.processes import Program

JOB = "/api/v1/jobs/notes"
EXAMPLES = 4
"""For each operation; what is found is the same every time."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    folder = tmp_path_factory.mktemp("api")
    with (
        running_mosquitto(folder / "mosquitto") as broker,
        live_fleet(folder, broker, devices=2) as fleet,
    ):
        yield fleet


def test_what_it_reads_is_what_the_view_has(fleet: LiveFleet) -> None:
    assert fleet.site.act(f"{JOB}/pause").status in (200, 409)
    with fleet.view() as view:
        told, known = fleet.site.ask(JOB).json(), json.loads(json.dumps(asdict(view.job())))
        assert {**told, "waiting_for": ""} == {**known, "waiting_for": ""}
        assert fleet.site.ask(f"{JOB}/settings").json() == view.settings()
        devices = fleet.site.ask(f"{JOB}/devices").json()
        assert devices["total"] == len(devices["devices"]) == view.counts().known
        versions = fleet.site.ask(f"{JOB}/versions").json()
        assert [one["version"] for one in versions] == [one.version for one in view.versions()]


def test_actions_change_what_they_say(fleet: LiveFleet) -> None:
    fleet.site.act(f"{JOB}/resume")
    with fleet.view() as view:
        done = fleet.site.act(f"{JOB}/policy", {"deadline_s": 1200, "quorum": 2})
        assert done.status == 200, done.text
        assert (view.policy().deadline_s, view.policy().quorum) == (1200, 2)
        back = fleet.site.act(f"{JOB}/policy", {"reset": ["deadline_s", "quorum"]})
        assert back.status == 200, back.text
        assert view.policy().quorum == 1
        assert fleet.site.act(f"{JOB}/pause").json()["said"].startswith("paused")
        newest = view.job().version
        answer = fleet.site.act(f"{JOB}/rollback", {"version": newest})
        assert (answer.status, "newest already" in answer.json()["detail"]) == (409, True)
        assert fleet.site.act(f"{JOB}/rollback", {"version": 10**6}).status == 404
        assert fleet.site.act(f"{JOB}/pause").status == 409


def test_an_action_that_is_sent_twice_is_done_once(fleet: LiveFleet) -> None:
    fleet.site.act(f"{JOB}/resume")
    same = {"idempotency-key": "pause-once"}
    first, again = (fleet.site.act(f"{JOB}/pause", **same) for _ in range(2))
    assert (first.status, again.status) == (200, 200)
    assert first.json() == again.json()
    assert fleet.site.act(f"{JOB}/pause").status == 409, "asked anew, it is paused already"


def test_health_is_told(fleet: LiveFleet) -> None:
    assert fleet.site.ask("/health/live").json() == {"live": True}
    assert fleet.site.ask("/health/ready").json() == {"ready": True}


def test_without_a_fleets_folder_nobody_is_enrolled(fleet: LiveFleet) -> None:
    answer = fleet.site.act("/api/v1/devices/enrol", {"device": "kitchen"})
    assert (answer.status, "fleet's folder" in answer.json()["detail"]) == (409, True)


def test_whatever_it_is_sent_it_makes_no_mistake(fleet: LiveFleet) -> None:
    """schemathesis goes through all that the API says of itself: good values, and bad ones."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"http://localhost:{fleet.site.port}{OPENAPI}")
    modes = schemathesis.GenerationMode
    found: list[str] = []
    sent: Counter[str] = Counter()
    for operation in (one.ok() for one in schema.get_all_operations()):
        for mode in (modes.POSITIVE, modes.NEGATIVE):
            try:
                _send(operation.as_strategy(mode), sent, found)
            except Unsatisfiable:  # it takes nothing that can be wrong
                assert mode is modes.NEGATIVE
    assert found == []
    assert len(sent) >= 20, "every operation"
    assert fleet.site.ask("/health/live").json() == {"live": True}


def _send(cases: Any, sent: Counter[str], found: list[str]) -> None:
    """Send some cases of an operation; note what the server could not cope with."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(cases)
    def send(case: Any) -> None:
        answer = case.call(headers={"x-tunefleet": "action"}, timeout=60)
        sent[case.operation.label] += 1
        if answer.status_code >= 500:
            found.append(f"{case.as_curl_command()}: {answer.status_code} {answer.text}")

    send()


OPENAPI = "/api/v1/openapi.json"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FleetFolder, Site]]:
    """A fleet with a folder, its broker, aggregator and page; nobody has joined."""
    folder = tmp_path_factory.mktemp("secured")
    fleet_settings = FleetSettings(
        hosts=["localhost"], port=free_port(), enrol_port=free_port(), bind="127.0.0.1"
    )
    fleet = create_fleet(folder / "fleet", fleet_settings, datetime.now(timezone.utc))
    file = folder / "job.json"
    file.write_text(live_job(10).model_dump_json())
    log = folder / "mosquitto.log"
    with mosquitto_of(fleet.path / "mosquitto.conf", log, fleet_settings.port):
        options = ["--dir", fleet.path, "--page", 0, "--json"]
        with Program("aggregator", ["serve", file, *options], folder, "serve") as program:
            port = int(program.wait_for("page")["url"].rpartition(":")[2])
            program.wait_for("serving")
            yield fleet, Site(port)


def test_a_device_is_let_in_and_put_out(secured: tuple[FleetFolder, Site]) -> None:
    fleet, site = secured
    made = site.act("/api/v1/devices/enrol", {"device": "kitchen", "hours": 2}).json()
    token = Token.parse(made["token"])
    registry: Registry = fleet.registry()
    try:
        use = registry.check_token(token.digest, "its keys", now=made["expires"] - 60)
        assert use.device == "kitchen"
    finally:
        registry.close()
    assert f"join https://localhost:{fleet.settings.enrol_port}" in made["command"]
    assert site.act("/api/v1/devices/kitchen/revoke").status == 200
    assert site.act("/api/v1/devices/attic/revoke").status == 404
    assert site.act("/api/v1/devices/enrol", {"device": "Kitchen!"}).status == 422


def test_what_the_page_shows_of_a_fleet_is_of_its_folder(
    secured: tuple[FleetFolder, Site],
) -> None:
    fleet, site = secured
    assert "Make a token" in site.ask("/jobs/notes").text
    with StateView(fleet.state("notes")) as view:
        assert site.ask(JOB).json()["folder"] == str(view.folder)
