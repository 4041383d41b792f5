"""Artifact sets for tests, each exported once, and the reason why there may be none."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import base_tiny
from edge_client.ort.runtime import missing_training
from tests.edge_client.test_torch_trainer import Make

MISSING = missing_training() or ("" if find_spec("onnx") else "onnx is not installed")
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@cache
def exported(make: Make) -> tuple[Path, Path]:
    """Return a model's folder and its artifact set's, which are there until the tests end."""
    from edge_client.ort.export import export_artifact

    folder = Path(_folder().name) / make.__name__
    folder.mkdir()
    model = make(folder)
    if model == folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base_tiny.PATH / name, folder)
    export_artifact(str(model), folder / "onnx")
    return model, folder / "onnx"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tunefleet-onnx-")
