"""A job is the same to a version that knows settings which the version that began it did not."""

import json

import pytest

from protocol.begun import difference
from tests.aggregator.uploading import make_job


def kept(*, without: tuple[str, ...] = (), **others: object) -> str:
    """Return a job as an earlier version kept it, which had no such settings of training."""
    job = json.loads(make_job().model_dump_json())
    for name in without:
        del job["training"][name]
    return json.dumps({**job, **others})


def test_a_setting_that_was_not_known_has_its_default() -> None:
    before = kept(without=("optimizer", "learning_rate_last"))
    assert difference(before, make_job()) is None
    said = difference(before, make_job(training={"learning_rate_last": 0.5}))
    assert said == "'notes', where training.learning_rate_last is 1.0, not 0.5"


def test_a_setting_that_is_known_no_more_is_none() -> None:
    assert difference(kept(colour="red"), make_job()) is None


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"seed": 1}, "'notes', where seed is 0, not 1"),
        ({"training": {"steps": 60}}, "'notes', where training.steps is 12, not 60"),
        ({"rule_settings": {"split": "left"}}, 'rule_settings.split is unset, not "left"'),
        ({"job": "letters"}, "'notes', not 'letters'"),
    ],
)
def test_the_first_difference_is_said(others: dict[str, object], said: str) -> None:
    assert said in str(difference(kept(), make_job(**others)))


def test_a_value_that_is_no_longer_one_is_said() -> None:
    said = difference(kept(remainder="melted"), make_job())
    assert said is not None
    assert said.startswith("'notes', begun by another version: remainder: ")
