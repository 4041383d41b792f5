"""What a fleet's job is filled up with for the rules of papers, and what not."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator.config import build_job
from aggregator.merge import RULES
from device_profiles.fleet import PUBLISHED, for_rule

BASE = {"name": "toy", "sha256": "0" * 64, "parameters": 9, "modules": {"m": [8, 6]}}


@pytest.mark.parametrize("rule", [*sorted(set(RULES) - set(PUBLISHED)), "trust-weights", None])
def test_what_is_no_published_rule_is_replayed_as_it_is_served(rule: str | None) -> None:
    job = {"rule": rule} if rule else {}
    assert for_rule(job) == (job, "")


@pytest.mark.parametrize("rule", PUBLISHED)
def test_a_published_rule_goes_with_what_it_was_published_with(rule: str) -> None:
    job, note = for_rule({"rule": rule, "training": {"steps": 3}})
    assert job == {
        "rule": rule,
        "remainder": "dropped",
        "directions": "top",
        "training": {"steps": 3, "learning_rate_by_rank": False},
    }
    assert note == (
        f'{rule} as published: remainder = "dropped", directions = "top", '
        "training.learning_rate_by_rank = false; --set changes them"
    )
    assert for_rule(job) == (job, "")


@pytest.mark.parametrize(
    "given", [{"layers": "fit"}, {"directions": "rotating"}, {"remainder": "frozen"}]
)
def test_what_a_job_says_goes_before_it(given: dict[str, Any]) -> None:
    job, _ = for_rule({"rule": "segment", **given})
    assert given.items() <= job.items()
    built, _ = build_job({"job": "notes", "base": BASE, **job}, "job.toml")
    assert built.remainder == "frozen"


def test_settings_that_are_none_are_left_for_who_reads_them() -> None:
    job, _ = for_rule({"rule": "fedavg", "training": 5})
    assert job["training"] == 5
