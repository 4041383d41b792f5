"""The Debian package: what is in it runs from where it lies, with the system's Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "deploy/deb/build.sh"


@pytest.mark.timeout(900)  # packages are fetched
def test_the_aggregators_package_holds_all_that_it_needs(tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None or not Path("/usr/bin/python3").exists():
        pytest.skip("not a Debian system: there is no dpkg-deb")
    venv = [Path("/usr/bin/python3"), "-c", "import ensurepip"]
    if subprocess.run(venv, capture_output=True, check=False).returncode:
        pytest.skip("the system's Python makes no environments: install python3-venv")
    built = subprocess.run(
        [BUILD, "aggregator", tmp_path], capture_output=True, text=True, check=True
    )
    package = Path(built.stdout.splitlines()[-1])
    fields = _said("dpkg-deb", "--field", package)
    assert "Package: tunefleet-aggregator\n" in fields
    assert "python3 (>= 3." in fields
    assert "Recommends: mosquitto\n" in fields
    tree = tmp_path / "tree"
    _said("dpkg-deb", "--extract", package, tree)
    assert "u tunefleet " in (tree / "usr/lib/sysusers.d/tunefleet-aggregator.conf").read_text()
    python = tree / "usr/lib/tunefleet-aggregator/bin/python"
    launcher = (tree / "usr/bin/aggregator").read_text()
    assert launcher.endswith('exec /usr/lib/tunefleet-aggregator/bin/python -m aggregator "$@"\n')
    _said(python, "-I", "-m", "aggregator", "init", tmp_path / "fleet", "--host", "localhost")
    unit = (tmp_path / "fleet/systemd/tunefleet-aggregator.service").read_text()
    assert f'ExecStart="{python}" -m aggregator serve' in unit
    (tmp_path / "fleet/job.toml").write_text('job = "notes"\nmodel = "base-tiny"\n')
    with (tmp_path / "fleet/fleet.toml").open("a") as settings:
        settings.write("[page]\nport = 0\n")
    checking = ["-I", "-m", "aggregator", "config", "check", "-c", tmp_path / "fleet/fleet.toml"]
    assert "in order" in _said(python, *checking), "the live page has all that it needs too"
    assert not list(tree.rglob("torch")), "the aggregator does without it"


def test_a_package_that_there_is_not_is_refused(tmp_path: Path) -> None:
    refused = subprocess.run(
        [BUILD, "phone", tmp_path], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "aggregator|edge-client" in refused.stderr


def _said(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout
