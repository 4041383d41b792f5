"""Which backend a device trains with: what it has, what fits, what is fastest, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import base_tiny
from device_profiles.schema import load_profile
from edge_client import backends
from edge_client.backends import better, check_backend, find_backends
from edge_client.config import Settings
from edge_client.errors import ConfigError, ModelError, NoPlanFits
from edge_client.model import describe_model
from edge_client.plan import Plan
from protocol.messages import Job
from protocol.transport import BrokerAddress
from tests.edge_client.ort.artifacts import exported, needs_onnx
from tests.edge_client.test_torch_trainer import llama, tiny

TORCH = Plan(8, 16, 2, 64, False, "f32", 1, 100.0, 200.0, predicted_tokens_s=100.0)
ONNX = replace(TORCH, backend="onnx", predicted_tokens_s=150.0)


def owner(backend: str = "auto", onnx: Path | None = None) -> Settings:
    return Settings(
        name="phone",
        broker=BrokerAddress("localhost", 1883),
        data=(),
        state=Path(),
        cache=Path(),
        profile=load_profile("laptop-16gb"),
        backend=backend,  # type: ignore[arg-type]
        onnx=onnx,
    )


def job() -> Job:
    return Job(job="notes", base=describe_model("base-tiny"), rounds=1, scale=2.0)


def test_the_faster_backend_is_taken_at_equal_rank() -> None:
    plan = better({"torch": TORCH, "onnx": ONNX}, 16, {})
    assert plan.backend == "onnx"
    assert plan.why_backend == "at the same rank torch trains 100 tokens/s, onnx 150"
    assert better({"torch": replace(TORCH, predicted_tokens_s=200.0), "onnx": ONNX}, 16, {}) == (
        replace(TORCH, predicted_tokens_s=200.0)
    )


def test_adams_moments_come_before_speed_and_after_rank() -> None:
    lean = replace(ONNX, optimizer="adafactor", predicted_tokens_s=300.0)
    plan = better({"torch": TORCH, "onnx": lean}, 16, {})
    assert plan.backend == "torch"
    assert plan.why_backend == "onnx has that rank without Adam's moments only"
    assert better({"torch": TORCH, "onnx": replace(lean, rank=16)}, 16, {}).backend == "onnx"


def test_the_larger_rank_and_all_blocks_come_before_speed() -> None:
    larger = replace(TORCH, rank=16)
    assert better({"torch": larger, "onnx": ONNX}, 16, {}).backend == "torch"
    some = replace(larger, blocks=3)
    plan = better({"torch": some, "onnx": ONNX}, 16, {})
    assert plan.backend == "onnx"
    assert plan.why_backend.startswith("what fits with torch is smaller: rank 16")


def test_what_does_not_fit_or_is_not_there_is_told() -> None:
    plan = better({"torch": NoPlanFits("300 MiB are missing"), "onnx": ONNX}, 16, {})
    assert plan == ONNX and plan.why_backend == "torch does not fit: 300 MiB are missing"
    assert better({"torch": TORCH}, 16, {"onnx": "no wheel"}).why_backend == "no wheel"
    with pytest.raises(NoPlanFits, match="300"):
        better({"torch": NoPlanFits("300"), "onnx": NoPlanFits("200")}, 16, {})


@needs_onnx
def test_both_are_found_with_the_folders_that_they_read() -> None:
    artifact = exported(tiny)[1]
    found = find_backends(owner(onnx=artifact), job())
    assert found.folders == {"torch": base_tiny.PATH, "onnx": artifact} and not found.missing
    assert set(find_backends(owner("onnx", artifact), job()).folders) == {"onnx"}


@needs_onnx
def test_an_artifact_set_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = exported(llama)[1]
    with pytest.raises(ModelError, match=r"is of 'llama' .*not of the job's 'base-tiny'"):
        find_backends(owner("onnx", other), job())
    found = find_backends(owner(onnx=other), job())
    assert set(found.folders) == {"torch"} and "is of 'llama'" in found.missing["onnx"]
    monkeypatch.setattr(backends, "missing_torch", lambda: "no torch")
    with pytest.raises(ModelError, match="is of 'llama'"):  # which says more than 'no torch'
        find_backends(owner(onnx=other), job())


def test_onnx_without_a_wheel_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing_training", lambda: "there is no wheel: use torch")
    with pytest.raises(ConfigError, match=r"^--backend onnx: there is no wheel: use torch$"):
        check_backend("onnx", None)
    check_backend("auto", None)  # torch is there
    found = find_backends(owner(), job())
    assert set(found.folders) == {"torch"} and "no wheel" in found.missing["onnx"]


@needs_onnx
def test_onnx_without_an_artifact_set_says_how_to_make_one() -> None:
    with pytest.raises(ConfigError, match="edge-client export-onnx MODEL --out DIR"):
        check_backend("onnx", None)


@pytest.mark.parametrize(
    ("there", "told"), [(None, r"^no torch$"), (object(), r"^no torch; .*artifact set")]
)
def test_a_device_with_neither_is_told_of_torch_and_of_what_it_has_a_part_of(
    there: object, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "missing_torch", lambda: "no torch")
    monkeypatch.setattr(backends, "_missing_onnx", lambda onnx: "no artifact set")
    monkeypatch.setattr(backends, "find_spec", lambda name: there)
    with pytest.raises(ConfigError, match=told):
        check_backend("auto", None)
