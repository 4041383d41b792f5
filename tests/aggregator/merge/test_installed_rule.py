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
from aggregator.merge.rule import Rule
from aggregator.merge.weighting import Weighting, anchored_by_previous, norm_share
from protocol.adapter import Adapter, Factors, LazyLayers


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


def leaves(view, settings):
    raise SystemExit(3)


def uneven(view):
    return [1.0] * len(view.updates)


def no_share(view):
    raise KeyError("loss")


twice = Rule(Weighting(uneven), product)
untold = Rule(Weighting(no_share), product)
no_factors = Rule(Weighting(norm_share), nothing)


class Asked:
    """A rule that says before a merge which settings it has."""

    def read(self, settings):
        if settings:
            raise BadRuleSettings("asked has no settings")

    def __call__(self, view, settings):
        return Merged(view.previous, {}, 0.0)


asked = Asked()


def broken(module):
    raise ZeroDivisionError("a mistake in it")


def leaving(module):
    raise SystemExit(4)


class Unreadable(dict):
    def items(self):
        raise ValueError("a mistake in it")


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")


def unspeakable(view, settings):
    raise Unspeakable


class NeverAsked:
    @property
    def read(self):
        raise RuntimeError("a mistake in it")

    def __call__(self, view, settings):
        return Merged(view.previous, {}, 0.0)


never_asked = NeverAsked()


def odd(view, settings):
    """Return a result of which one part is replaced by what the settings name."""
    good = Merged(view.previous, {"d0": 1.0}, 0.0)
    a, b, scale = view.previous.layers["m"].a, view.previous.layers["m"].b, 2.0
    return replace(good, **{
        "too large": {"adapter": Adapter({"m": Factors(a.astype("f8") * 1e300, b)}, scale)},
        "complex": {"adapter": Adapter({"m": Factors(a + 1j, b)}, scale)},
        "lists": {"adapter": Adapter({"m": Factors(a.tolist(), b)}, scale)},
        "rescaled": {"adapter": Adapter({"m": Factors(a, b)}, 7.0)},
        "scale in words": {"adapter": Adapter({"m": Factors(a, b)}, "two")},
        "no adapter": {"adapter": None},
        "layers alone": {"adapter": {"m": Factors(a, b)}},
        "no weights": {"weights": None},
        "strange weight": {"weights": {"nobody": 1.0}},
        "negative weight": {"weights": {"d0": -5.0}},
        "weight that is no number": {"weights": {"d0": float("nan")}},
        "residual in words": {"residual": "low"},
        "residual that is no number": {"residual": float("nan")},
        "one warning": {"warnings": "careful"},
        "no memory": {"memory": None},
        "a number for a module": {"adapter": Adapter({3: Factors(a, b)}, scale)},
        "no module's name": {"adapter": Adapter({None: Factors(a, b)}, scale)},
        "listed layers": {"adapter": Adapter([a, b], scale)},
        "lazy": {"adapter": Adapter(LazyLayers(("m",), broken), scale)},
        "leaving": {"adapter": Adapter(LazyLayers(("m",), leaving), scale)},
        "unreadable": {"adapter": Adapter(Unreadable(m=1), scale)},
        "two lines": {"warnings": ["one\\nand two"]},
        "wide": {"adapter": Adapter({"m": Factors(a.astype("f8"), b.astype("f2"))}, scale)},
    }[settings["what"]])
'''
ENTRY_POINTS = """[tunefleet.rules]
longest = fleet_rules_example:longest
by-norm = fleet_rules_example:by_norm
text = fleet_rules_example:text
nothing = fleet_rules_example:nothing
spoiled = fleet_rules_example:spoiled
leaves = fleet_rules_example:leaves
unspeakable = fleet_rules_example:unspeakable
never-asked = fleet_rules_example:never_asked
leaves-at-once = fleet_rules_leaving:rule
class = fleet_rules_example:Asked
asked = fleet_rules_example:asked
odd = fleet_rules_example:odd
twice = fleet_rules_example:twice
untold = fleet_rules_example:untold
no-factors = fleet_rules_example:no_factors
anchored = fleet_rules_example:nothing
missing = fleet_rules_example:no_such_name
gone = no_such_package:rule
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a package and its metadata down as pip does."""
    (tmp_path / "fleet_rules_example.py").write_text(PACKAGE)
    (tmp_path / "fleet_rules_leaving.py").write_text("raise SystemExit(7)")
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
        ("leaves", "fleet_rules_example:leaves.* failed: SystemExit: 3"),
        ("unspeakable", "unspeakable.* failed: Unspeakable: it can't say why"),
        ("leaves-at-once", "fleet_rules_leaving:rule.* cannot be loaded: SystemExit: 7"),
        ("class", "fleet_rules_example:Asked.* is not a function"),
        ("twice", "rule 'twice' .*shares .1.0, 1.0. are not 2 numbers of 0 or more whose sum is 1"),
        ("untold", "fleet_rules_example:untold.* failed: KeyError: 'loss'"),
        ("no-factors", "fleet_rules_example:no_factors.* failed: TypeError"),
        ("missing", "no_such_name.* cannot be loaded: AttributeError"),
        ("gone", "no_such_package:rule.* cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_what_is_no_rule_is_named(name: str, said: str) -> None:
    with pytest.raises(MergeError, match=said):
        merge(name, a_round())


def test_an_unknown_name_lists_it_or_is_taken_for_it() -> None:
    with pytest.raises(UnknownRule, match="krum, asked, by-norm") as raised:
        merge("other", a_round())
    assert str(raised.value).count("anchored") == 1, "a built-in rule can't be replaced"
    with pytest.raises(UnknownRule, match=r"did you mean 'longest'\?"):
        merge("longer", a_round())
    assert merge("anchored", a_round()).weights


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("too large", "module m: the merged values are too large for float32"),
        ("complex", "module m: A is complex64, not an array of floats"),
        ("lists", "module m: A is list, not an array of floats"),
        ("rescaled", "its scale is 7, and the job's 2: multiply B"),
        ("scale in words", "its scale is 'two', not a number"),
        ("no adapter", "it is of type NoneType, not an Adapter"),
        ("layers alone", "it is of type dict, not an Adapter"),
        ("no weights", "its weights are of type NoneType, not by device"),
        ("strange weight", "it has a weight for 'nobody', which sent nothing"),
        ("negative weight", "its weight of d0 is -5.0, not a number of 0 or more"),
        ("weight that is no number", "its weight of d0 is nan, not a number"),
        ("residual in words", "its residual is 'low', not a number"),
        ("residual that is no number", "its residual is nan, not a number"),
        ("one warning", "its warnings are of type str, not texts"),
        ("no memory", "its memory is of type NoneType, not Memory"),
        ("a number for a module", "module 3: the job and the adapter differ"),
        ("no module's name", "the job and the adapter differ"),
        ("listed layers", "its layers are of type list, not by module"),
    ],
)
def test_what_is_no_result_is_said_in_the_name_of_the_rule(what: str, said: str) -> None:
    with pytest.raises(MergeError, match=rf"rule 'odd' .*returned what is no result: .*{said}"):
        merge("odd", a_round(), settings={"what": what})


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("lazy", "ZeroDivisionError: a mistake in it"),
        ("unreadable", "ValueError: a mistake in it"),
        ("leaving", "SystemExit: 4"),
    ],
)
def test_what_fails_when_its_result_is_read_is_said_in_its_name(what: str, error: str) -> None:
    said = rf"rule 'odd' .*returned what can't be read: {error}"
    with pytest.raises(MergeError, match=said):
        merge("odd", a_round(), settings={"what": what})


def test_its_warnings_are_a_line_each() -> None:
    assert merge("odd", a_round(), settings={"what": "two lines"}).warnings == ("one and two",)


def test_a_result_of_any_float_type_is_taken_in_the_one_that_travels() -> None:
    found = merge("odd", a_round(), settings={"what": "wide"}).adapter.layers["m"]
    assert (found.a.dtype, found.b.dtype) == (np.float32, np.float32)


def test_a_job_with_a_rule_that_does_not_fit_is_refused_when_it_is_read() -> None:
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 9, "modules": {"m": [8, 6]}}
    fields = {"job": "notes", "base": base, "rule": "asked"}
    build_job(fields, "job.toml")
    with pytest.raises(ConfigError, match=r"job.toml: rule_settings: asked has no settings"):
        build_job({**fields, "rule_settings": {"typo": 1}}, "job.toml")
    with pytest.raises(ConfigError, match=r"job.toml: rule 'gone' .*mend or remove the package"):
        build_job({**fields, "rule": "gone"}, "job.toml")
    with pytest.raises(ConfigError, match=r"'never-asked' .*failed: RuntimeError: a mistake in it"):
        build_job({**fields, "rule": "never-asked"}, "job.toml")


def test_a_name_that_two_packages_bring_is_refused(tmp_path: Path) -> None:
    metadata = tmp_path / "other_rules_example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-rules-example\n")
    (metadata / "entry_points.txt").write_text("[tunefleet.rules]\nasked = other:rule\n")
    with pytest.raises(
        MergeError,
        match="'asked' comes from two packages, fleet_rules_example:asked and other:rule: remove",
    ):
        merge("asked", a_round())
    assert merge("longest", a_round()).weights
