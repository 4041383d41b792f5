"""What `aggregator export` writes, says and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aggregator.card import CARD, model_card
from aggregator.errors import StoreError
from aggregator.export import FILES, export_adapter
from aggregator.places import Place, common
from aggregator.store import Store
from aggregator.view.models import RoundView
from protocol.adapter import initial_adapter, parameter_count
from tests.aggregator.uploading import MODULES, Aggregator, make_job


def aggregator(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aggregator", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return the state folder of an aggregator whose job has a first version."""
    job = make_job()
    Aggregator(tmp_path / "state", job).store.close()
    return tmp_path / "state"


def test_the_command_tells_programs_what_it_wrote(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    done = aggregator("export", out, "--state", state, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    files = said.pop("files")
    assert said == {
        "folder": str(out),
        "version": 1,
        "rank": 128,
        "parameters": parameter_count(MODULES, 128),
    }
    assert files == {path.name: path.stat().st_size for path in out.iterdir()}
    assert sorted(files) == sorted(FILES)


def test_the_command_tells_people_what_it_wrote(state: Path, tmp_path: Path) -> None:
    done = aggregator("export", tmp_path / "adapter", "--state", state)
    parameters = parameter_count(MODULES, 128)
    said = f"version 1 is in {tmp_path / 'adapter'}: rank 128, {parameters:,} parameters\n"
    assert done.stdout == said


def test_an_earlier_export_is_written_over(state: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert export_adapter(state, tmp_path / "adapter") == export_adapter(
        state, tmp_path / "adapter"
    )


def test_a_folder_with_other_content_is_left_alone(state: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(StoreError, match=r"photos holds something else .*cat\.jpg.*new folder"):
        export_adapter(state, tmp_path / "photos")
    with pytest.raises(StoreError, match=r"cat\.jpg is a file; name a folder"):
        export_adapter(state, tmp_path / "photos" / "cat.jpg")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_readme_of_somebody_elses_is_left_alone(state: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(StoreError, match=r"something else than an adapter \(README\.md\)"):
        export_adapter(state, tmp_path)


def test_the_card_says_what_the_adapter_is(state: Path, tmp_path: Path) -> None:
    export_adapter(state, tmp_path / "adapter")
    card = (tmp_path / "adapter" / CARD).read_text()
    job = make_job()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == job.base.name
    assert head["library_name"] == "peft"
    for said in (
        job.base.sha256,
        "rank 128",
        f"rule `{job.rule}`",
        "version 1",
        "| none yet | | |",
    ):
        assert said in card


def test_the_card_has_the_rounds_up_to_its_version() -> None:
    job = make_job()
    whole = initial_adapter(MODULES, 4, job.scale, seed=0)
    rounds = [made_round(3, None), made_round(2, 3), made_round(1, 2, loss=2.5)]
    card = model_card(job, common(2), whole, rounds)
    assert "| 1 | 4 | 2.5000 |" in card
    assert "| 2 |" not in card, "version 2 is what round 1 came to"
    assert "| 2 | 4 |  |" in model_card(job, common(3), whole, rounds)
    assert "phone's own" in model_card(job, Place("personal", 2, "phone"), whole, rounds)


def made_round(number: int, version: int | None, loss: float | None = None) -> RoundView:
    return RoundView(number, version, 0.0, 1.0, "", 0.1, loss, 4, 0, {2: 4}, 10, 10, None)


def test_a_version_that_is_not_there(state: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no version 7 in .*state; the newest is 1"):
        export_adapter(state, tmp_path / "adapter", version=7)
    assert not (tmp_path / "adapter").exists()


def test_a_state_folder_without_a_version(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(StoreError, match=r"no aggregator's state in .*empty; name with --state"):
        export_adapter(tmp_path / "empty", out)
    store = Store(tmp_path / "state")
    with pytest.raises(StoreError, match=r"no job has been served from .*state yet"):
        export_adapter(tmp_path / "state", out)
    store.bind_job(make_job())
    with pytest.raises(StoreError, match=r"no version in .*state yet: .*aggregator serve"):
        export_adapter(tmp_path / "state", out)
    assert not out.exists()
    assert not (tmp_path / "empty").exists()
