"""What the benchmarks of memory claim follows from what they measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import caps, made_models, memory_plan
from benchmarks.memory_cases import CASES, QUICK
from edge_client.model import describe_model
from edge_client.profile import slug


def test_there_are_enough_cases_each_remembered_by_a_name_of_its_own() -> None:
    assert len(CASES) >= 24
    assert CASES[: len(QUICK)] == QUICK
    assert len({slug(str(case)) for case in CASES}) == len(CASES)
    for attribute in ("model", "dtype", "checkpointing", "micro_batch", "length"):
        assert len({getattr(case, attribute) for case in CASES}) > 1


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ([1.0] * 24, [True, True, True, True]),
        ([1.0] * 22 + [0.88, 0.88], [True, True, True, True]),
        ([1.0] * 21 + [0.88] * 3, [True, False, True, True]),
        ([1.0] * 23 + [0.84], [True, True, False, True]),
        ([1.0] * 23 + [1.06], [True, True, True, False]),
        ([1.0] * 10, [False, True, True, True]),
    ],
)
def test_claims_on_predictions(ratios: list[float], met: list[bool]) -> None:
    assert [claim.met for claim in memory_plan.claims(ratios)] == met


def row(**more: Any) -> dict[str, Any]:
    fine = {"used": 0.9, "larger": True, "stepped_down": 0, "killed": 0, "merged": 1}
    return {**fine, **more}


def test_claims_on_caps() -> None:
    rows = [row() for _ in caps.BUDGETS_MIB]
    assert all(claim.met for claim in caps.claims(rows))
    bad = [{"merged": 0}, {"killed": 1}, {"stepped_down": 1}, {"used": 1.01}, {"used": 0.5}]
    for more in bad:
        assert not all(claim.met for claim in caps.claims([*rows[1:], row(**more)]))
    assert all(claim.met for claim in caps.claims([*rows[1:], row(used=0.5, larger=False)]))


def test_a_made_model_is_described_as_its_shape_and_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setitem(made_models.SHAPES, "small", shape)
    one, other = (
        describe_model(str(made_models.make_model("small", tmp_path / part))) for part in "ab"
    )
    assert one.sha256 == other.sha256
    assert one.modules["model.layers.1.self_attn.k_proj"] == (32, 64)
    assert one.parameters == 2048 * 64 + 64 + 2 * (64 * (64 + 32 + 32 + 64 + 3 * 96) + 128)
