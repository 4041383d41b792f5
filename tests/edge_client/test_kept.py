"""Which of a device's adapters a name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from edge_client.errors import ConfigError, ModelError
from edge_client.kept import GLOBAL, MIXED, NONE, PERSONAL, best_adapter, find_adapter
from edge_client.result import keep_result
from edge_client.storage import keep_adapter
from protocol.adapter import Adapter
from protocol.messages import BaseModelInfo, Job
from tests.edge_client.test_outbox_download import MODULES
from tests.edge_client.test_torch_trainer import random_adapter

BASE = BaseModelInfo(name="toy", sha256="a" * 64, parameters=1, modules=MODULES)


def keep(state: Path, *folders: str) -> None:
    for seed, name in enumerate(folders):
        keep_adapter(random_adapter(MODULES, 2, seed=seed), state / name, BASE)


@pytest.mark.parametrize(
    ("folders", "shared", "personal", "best"),
    [
        (["adapter"], "adapter", None, "adapter"),
        (["adapter", "common"], "common", "adapter", "adapter"),
        (["adapter", "private", "mixed"], "adapter", "mixed", "mixed"),
        (["adapter", "common", "mixed"], "common", "mixed", "mixed"),
    ],
)
def test_names_mean_folders(
    tmp_path: Path, folders: list[str], shared: str, personal: str | None, best: str
) -> None:
    keep(tmp_path, *folders)
    found = find_adapter(GLOBAL, tmp_path)
    assert found.folder == tmp_path / shared
    assert (found.base, found.base_sha256) == ("toy", "a" * 64)
    if personal is None:
        with pytest.raises(ConfigError, match="no adapter of its own: there is none in"):
            find_adapter(PERSONAL, tmp_path)
    else:
        assert find_adapter(PERSONAL, tmp_path).folder == tmp_path / personal
    assert best_adapter(tmp_path).folder == tmp_path / best
    alone = find_adapter(NONE, tmp_path)
    assert (alone.folder, alone.base, alone.sha256) == (None, "toy", "")


def test_a_device_without_adapters_says_what_to_do(tmp_path: Path) -> None:
    for name in (GLOBAL, PERSONAL, MIXED):
        with pytest.raises(ConfigError, match=r"take part in a job .* or choose another --adapter"):
            find_adapter(name, tmp_path)
    assert best_adapter(tmp_path).name == NONE


def test_what_an_earlier_job_has_left_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    class Learner:
        def evaluate(self, adapter: Adapter) -> float:
            return 1.0

    keep(tmp_path, "adapter", "common", "private", "mixed")
    job = Job(job="next", base=BASE, scale=2.0, ladder=[2], rounds=1)
    keep_result(tmp_path, job, cast("Any", Learner()), random_adapter(MODULES, 2), None)
    assert best_adapter(tmp_path).folder == tmp_path / "adapter"
    with pytest.raises(ConfigError):
        find_adapter(MIXED, tmp_path)


def test_a_folder_is_taken_and_another_adapter_has_another_hash(tmp_path: Path) -> None:
    keep(tmp_path, "adapter", "common")
    one, other = (find_adapter(str(tmp_path / name), tmp_path) for name in ("adapter", "common"))
    assert one.name == "adapter" and one.sha256 != other.sha256
    assert one.sha256 == find_adapter(PERSONAL, tmp_path).sha256


@pytest.mark.parametrize("spoil", ["config", "weights", "json", "list"])
def test_what_is_no_adapter_is_told(tmp_path: Path, spoil: str) -> None:
    keep(tmp_path, "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    if spoil == "config":
        config.unlink()
    elif spoil == "weights":
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    else:
        config.write_text("{" if spoil == "json" else "[]")
    with pytest.raises(ModelError, match=str(tmp_path / "adapter")) as caught:
        find_adapter(str(tmp_path / "adapter"), tmp_path)
    assert "\n" not in str(caught.value)
