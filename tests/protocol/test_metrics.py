"""What a device may tell of its training, and which job asks for it."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.metrics import TOKEN_BUCKETS, asked_for, token_histogram, wrong_metric


def test_which_metrics_a_job_asks_for() -> None:
    assert asked_for({"weights": "loss-reduction"}) == ("train_loss_before", "train_loss_after")
    assert asked_for({"weights": "discrepancy"}) == TOKEN_BUCKETS
    for others in ({}, {"weights": "samples"}, {"weights": ["discrepancy"]}, {"weights": 1}):
        assert asked_for(others) == ()


def test_the_buckets_are_the_top_bits_of_a_product() -> None:
    tokens = np.random.default_rng(0).integers(0, 200_000, 5000)
    plain = [0] * 16
    for token in tokens.tolist():
        plain[token * 2654435761 % 2**32 >> 28] += 1
    assert token_histogram(tokens.astype(np.int32)).tolist() == plain
    assert min(plain) > 200, "tokens spread"


@pytest.mark.parametrize("name", ["train_loss_before", "train_loss_after", "tokens_15"])
@pytest.mark.parametrize("value", [-1.0, -1e-300, 1.2e12, float("inf"), float("nan")])
def test_a_number_that_cannot_be_is_named(name: str, value: float) -> None:
    assert f"metric {name} is {value:g}" in wrong_metric({"tokens_0": 1.0, name: value})


def test_numbers_of_other_names_are_nobodys_business() -> None:
    assert wrong_metric({"held_out_loss": -1.0, "tokens_16": -1.0, "tokens_0": 0.0}) == ""
