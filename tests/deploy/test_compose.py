"""The compose file: what it mounts is there, and its parts agree on their ports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/compose"
BROUGHT = {"job.toml"}
"""What the operator puts there."""


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return found


def test_what_is_mounted_from_the_repository_is_there(services: dict[str, Any]) -> None:
    mounts = [v for one in services.values() for v in one.get("volumes", []) if v[0] == "."]
    assert len(mounts) > 3
    for mount in mounts:
        name = mount.split(":")[0]
        assert Path(name).name in BROUGHT or (FOLDER / name).exists(), mount


def test_prometheus_asks_where_the_page_listens(services: dict[str, Any]) -> None:
    asked = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    target = asked["scrape_configs"][0]["static_configs"][0]["targets"][0]
    serve = services["aggregator"]["command"]
    assert target == f"127.0.0.1:{serve[serve.index('--page') + 1]}"
    source = yaml.safe_load((FOLDER / "grafana/datasources.yml").read_text())
    url = source["datasources"][0]["url"].removeprefix("http://")
    assert f"--web.listen-address={url}" in services["prometheus"]["command"]


def test_the_image_is_made_of_what_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    packages = re.search(r"packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert packages is not None
    assert set(re.findall(r'"(\w+)"', packages[1])) <= sent
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= sent


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is missing")
def test_docker_compose_takes_it(tmp_path: Path) -> None:
    command = ["docker-compose", "-f", str(FOLDER / "compose.yaml"), "config", "--quiet"]
    named = {**os.environ, "TUNEFLEET_HOST": "fleet.example"}
    done = subprocess.run(command, env=named, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named.pop("TUNEFLEET_HOST")
    refused = subprocess.run(command, env=named, capture_output=True, text=True, check=False)
    assert "by which devices reach this computer" in refused.stderr
