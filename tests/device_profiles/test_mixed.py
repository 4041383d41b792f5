"""Which devices of a mixed fleet train with ONNX Runtime: those that a plan with it fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_profiles.backends import mixed
from device_profiles.errors import ReplayError, TooLarge
from device_profiles.fleet import demo_fleet
from device_profiles.replay import _ask
from edge_client.errors import NoPlanFits
from protocol.cli import EXIT_TOO_LARGE, run_command


def test_only_what_does_not_fit_is_passed_over() -> None:
    def ask(arguments: list[str]) -> str:
        if "raspberry-pi-3b-plus-1gb" in arguments:
            raise TooLarge("no plan fits")
        return ""

    fleet = mixed(demo_fleet(), Path("job.json"), 1.0, Path("onnx"), ask)
    assert [d.name for d in fleet.devices if d.backend == "onnx"] == [
        "pi-4b-2gb",
        "pi-4b-4gb",
        "jetson-nano",
    ]

    def broken(_: list[str]) -> str:
        raise ReplayError("can't read onnx/manifest.json")

    with pytest.raises(ReplayError, match="can't read onnx/manifest"):
        mixed(demo_fleet(), Path("job.json"), 1.0, Path("onnx"), broken)


def test_the_command_says_by_its_exit_code_that_no_plan_fits() -> None:
    def app() -> None:
        raise NoPlanFits("no plan fits")

    with pytest.raises(SystemExit) as ended:
        run_command(app)
    assert ended.value.code == EXIT_TOO_LARGE


@pytest.mark.timeout(280)
def test_a_plan_that_fails_is_told_from_one_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="nosuch") as caught:
        _ask(["plan", "--profile", "nosuch"])
    assert not isinstance(caught.value, TooLarge)
    with pytest.raises(TooLarge):
        _ask(["plan", "--memory-cap", "1", "--threads", "1", "--cache", str(tmp_path)])
