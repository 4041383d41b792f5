"""A rule of another package: found by its entry point, given its settings, its errors named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from aggregator.config import build_job
from aggregator.errors import BadRuleSettings, ConfigError, MergeError, UnknownRule
from aggregator.merge import RoundView, Update, merge
from protocol.adapter import Adapter, Factors

PACKAGE = '''
"""The largest update of a round: an example of a rule of one's own."""

from dataclasses import replace

from aggregator.errors import BadRuleSettings
from aggregator.merge import Merged, RULES
from aggregator.merge.combine import product
from aggregator.merge.rules import Rule
from aggregator.merge.weighting import Weighting, anchored_by_previous, norm_share


def longest(view, settings):
    if strange := set(settings) - {"at_least"}:
        raise BadRuleSettings(f"longest has no setting {min(strange)!r}; it has 'at_least'")
    found = max(view.updates, key=lambda update: update.examples)
    if found.examples < settings.get("at_least", 0):
        raise RuntimeError("nobody has\\nthat much")
    return RULES["anchored"](replace(view, updates=[found]), {})


by_norm = Rule(Weighting(norm_share, anchored_by_previous), product)
text = "no function"


def nothing(view, settings):
    return None


def spoiled(view, settings):
    return Merged(view.updates[0].adapter, {}, 0.0)
'''
ENTRY_POINTS = """[tunefleet.rules]
longest = fleet_rules_example:longest
by-norm = fleet_rules_example:by_norm
text = fleet_rules_example:text
nothing = fleet_rules_example:nothing
spoiled = fleet_rules_example:spoiled
missing = fleet_rules_example:no_such_name
gone = no_such_package:rule
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a package and its metadata down as pip does."""
    (tmp_path / "fleet_rules_example.py").write_text(PACKAGE)
    metadata = tmp_path / "fleet_rules_example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fleet-rules-example\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fleet_rules_example", raising=False)


def a_round() -> RoundView:
    rng = np.random.default_rng(0)

    def adapter(rank: int) -> Adapter:
        a, b = rng.standard_normal((rank, 6)), rng.standard_normal((8, rank))
        return Adapter({"m": Factors(a.astype(np.float32), b.astype(np.float32))}, 2.0)

    updates = [
        Update(f"d{k}", adapter(2), {"m": np.arange(2)}, examples, {})
        for k, examples in enumerate([3, 9])
    ]
    return RoundView(adapter(4), updates, {"m": (8, 6)}, 4, 0)


def test_it_is_found_and_gets_its_settings() -> None:
    assert merge("longest", a_round(), settings={"at_least": 9}).weights == {"d1": 1.0}
    with pytest.raises(BadRuleSettings, match="longest has no setting 'least'"):
        merge("longest", a_round(), settings={"least": 9})


def test_its_error_is_named_in_one_line() -> None:
    with pytest.raises(MergeError) as raised:
        merge("longest", a_round(), settings={"at_least": 10})
    assert str(raised.value) == (
        "cannot merge: rule 'longest' (fleet_rules_example:longest) failed: "
        "RuntimeError: nobody has that much"
    )


def test_built_from_halves_it_has_the_settings_of_every_rule() -> None:
    capped = merge("by-norm", a_round(), settings={"cap": 0.5}).weights
    assert capped == pytest.approx({"d0": 0.5, "d1": 0.5})
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 9, "modules": {"m": [8, 6]}}
    fields = {"job": "notes", "base": base, "rule": "by-norm", "rule_settings": {"cop": 1}}
    with pytest.raises(ConfigError, match="no setting 'cop'; did you mean 'cap'"):
        build_job(fields, "job.toml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "fleet_rules_example:text.* is not a function"),
        ("nothing", "fleet_rules_example:nothing.* returned NoneType, not Merged"),
        ("spoiled", "spoiled.* returned what is no result: .*module m: the shared adapter has"),
        ("missing", "no_such_name.* cannot be loaded: AttributeError"),
        ("gone", "no_such_package:rule.* cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_what_is_no_rule_is_named(name: str, said: str) -> None:
    with pytest.raises(MergeError, match=said):
        merge(name, a_round())


def test_an_unknown_name_lists_it_or_is_taken_for_it() -> None:
    with pytest.raises(UnknownRule, match="krum, by-norm, gone, longest"):
        merge("other", a_round())
    with pytest.raises(UnknownRule, match=r"did you mean 'longest'\?"):
        merge("longer", a_round())
