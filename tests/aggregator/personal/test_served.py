"""A job with personal adapters from its first round to its last: who gets what, when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aggregator.errors import StoreError
from aggregator.export import export_adapter
from aggregator.merge.lowrank import gram
from aggregator.personal.temperature import START
from aggregator.places import Place, common
from aggregator.updates import upload_directions
from protocol.adapter import Adapter, Factors
from protocol.messages import Round
from tests.aggregator.personal.conftest import SIZES, Fleet
from tests.aggregator.personal.personal_device import PersonalDevice

pytestmark = pytest.mark.timeout(120)
Begin = Callable[..., Fleet]
EVERYBODY = tuple(SIZES)
PROBE = {"text": "A public text.", "positions": 3, "top_k": 4}


def apart(one: Adapter, other: Adapter) -> float:
    """Return how far two adapters' products lie apart, in parts of the second's norm."""
    g = gram([one, other])
    return float(np.sqrt(max(0.0, g[0, 0] + g[1, 1] - 2 * g[0, 1]) / g[1, 1]))


def trained(device: PersonalDevice, held: Adapter, number: int) -> Adapter:
    """Return what a device has after training in a round: what it held, and its change."""
    counted = device.manifests[number]
    size = np.float32(device.learn(Round(job="notes", number=number, state="open", version=1)))
    layers = {}
    for name, at in upload_directions(device.job, counted).items():
        a, b = held.layers[name].a.copy(), held.layers[name].b.copy()
        a[at] += size
        b[:, at] += size
        layers[name] = Factors(a, b)
    return Adapter(layers, held.scale)


def test_everybody_goes_on_from_its_own(fleet_of: Begin) -> None:
    """So sharp that each trusts itself alone: what it had is what it gets, round after round."""
    fleet = fleet_of(
        "trust-weights", rounds=3, rule_settings={"temperature": 1e-6, "momentum": 0.0}
    )
    fleet.serve()
    for name in EVERYBODY:
        fleet.join(name)
    fleet.run(lambda: all(d.manifest(common(1)) for d in fleet.devices.values()))
    held = {name: fleet.devices[name].adapter(common(1)) for name in EVERYBODY}
    for number in (1, 2, 3):
        fleet.run_rounds(number)
        for name, device in fleet.devices.items():
            full = trained(device, held[name], number)
            held[name] = device.adapter(Place("personal", number + 1, name))
            assert apart(held[name], full) < 1e-3, (name, number)
        assert apart(held["attic"], held["cellar"]) > 0.1
        np.testing.assert_allclose(fleet.trust(number)["weights"], np.eye(4), atol=1e-5)
    last = fleet.devices["attic"].manifest(common(4))
    assert last is not None and last.personal == dict.fromkeys(EVERYBODY, 4)
    assert fleet.aggregators[0].wait() == 0


def test_by_weights_those_who_are_alike_share(fleet_of: Begin) -> None:
    fleet = fleet_of("trust-weights", rounds=3)
    fleet.serve()
    for name in EVERYBODY:
        fleet.join(name, lambda what, _: {"received": 2.0, "own": 2.0, "trial": 1.0}.get(what))
    fleet.run_rounds(2)
    weights = np.array(fleet.trust(1)["weights"])
    assert (weights[:2, :2] > 10 * weights[:2, 2:]).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    attic = fleet.devices["attic"]
    second, third = attic.manifest(common(2)), attic.manifest(common(3))
    assert second is not None and third is not None
    assert (second.trials, second.candidates) == (list(EVERYBODY), 0)
    assert third.personal == dict.fromkeys(EVERYBODY, 3)
    start = START["trust-weights"]
    assert fleet.trust(1)["temperatures"] == dict.fromkeys(EVERYBODY, start)
    assert fleet.trust(2)["temperatures"] == dict.fromkeys(EVERYBODY, 2 * start), "the trial won"
    assert apart(attic.adapter(Place("trial", 3, "attic")), attic.adapter(common(3))) > 0
    fleet.run_rounds(3)
    last = attic.manifest(common(4))
    assert last is not None and (last.trials, last.candidates) == (list(EVERYBODY), 0)
    assert fleet.aggregators[0].wait() == 0
    kept = {place.version for place in fleet.store().issued.places() if place.kind == "personal"}
    assert kept == {2, 3, 4}


def test_by_validation_who_answers_gets_a_mixture(fleet_of: Begin) -> None:
    fleet = fleet_of("trust-validation", rounds=3, rule_settings={"candidates": 3})
    fleet.serve()
    numbers = {"0": 1.0, "1": 2.0, "2": 3.0}

    def losses(what: str, now: Round) -> float | None:
        if what == "own":
            return 1.5 if now.number > 1 else None
        return {"received": 2.0, "trial": 1.9, **numbers}.get(what)

    for name in EVERYBODY:
        fleet.join(name, (lambda *_: None) if name == "den" else losses)
    fleet.run_rounds(1)
    attic = fleet.devices["attic"]
    second = attic.manifest(common(2))
    assert second is not None
    assert (second.personal, second.trials, second.candidates) == ({}, [], 3)
    offered = fleet.store().issued.candidates(2)
    for number, name in offered.items():
        full = trained(fleet.devices[name], attic.adapter(common(1)), 1)
        assert apart(attic.adapter(Place("candidate", 2, str(number))), full) < 1e-3
    fleet.run_rounds(2)
    third = attic.manifest(common(3))
    assert third is not None
    assert third.personal == dict.fromkeys(("attic", "barn", "cellar"), 3), "den told nothing"
    assert third.trials == ["attic", "barn", "cellar"] and third.candidates == 3
    assert Place("personal", 3, "den") not in fleet.devices["den"].places()
    kept = fleet.store().issued.trust(2)
    assert kept is not None
    scores = kept.scores[kept.devices.index("barn")]
    told = {offered[int(n)]: 2.0 - loss for n, loss in numbers.items()} | {"barn": 0.5}
    assert dict(zip(kept.devices, scores, strict=True)) == {
        name: pytest.approx(told[name]) if name in told else None for name in EVERYBODY
    }
    weights = fleet.trust(2)["weights"]
    assert weights == kept.weights
    assert weights[3] == pytest.approx([0.25] * 4), "den has the shares of the common adapter"
    fleet.run_rounds(3)
    assert fleet.aggregators[0].wait() == 0


def test_by_predictions_who_answers_the_probe_gets_a_mixture(fleet_of: Begin) -> None:
    fleet = fleet_of("trust-predictions", rounds=3, probe=PROBE)
    fleet.serve()
    tokens = {"attic": range(4), "barn": range(4), "cellar": range(90, 94), "den": None}
    for name in EVERYBODY:
        fleet.join(name, tokens=tokens[name])
    fleet.run_rounds(3)
    last = fleet.devices["den"].manifest(common(4))
    assert last is not None and last.personal == dict.fromkeys(("attic", "barn", "cellar"), 4)
    for number in (1, 2, 3):
        weights = np.array(fleet.trust(number)["weights"])
        assert weights[0, 1] == pytest.approx(weights[0, 0]) and weights[0, 3] == 0
        assert weights[0, 1] > 5 * weights[0, 2]
    assert fleet.aggregators[0].wait() == 0


def test_who_is_away_keeps_its_own_and_comes_back_to_it(fleet_of: Begin, tmp_path: Path) -> None:
    fleet = fleet_of("trust-weights", rounds=4)
    fleet.serve()
    for name in EVERYBODY:
        fleet.join(name)
    fleet.run_rounds(1)
    fleet.devices.pop("den").leave()
    fleet.run_rounds(3)
    attic = fleet.devices["attic"]
    fourth = attic.manifest(common(4))
    assert fourth is not None
    assert fourth.personal == {"attic": 4, "barn": 4, "cellar": 4, "den": 2}
    store = fleet.store()
    assert store.round().number == 4
    den = fleet.join("den")
    fleet.run_rounds(4)
    counted = {m.device: m.personal for m in store.uploads.of_round(4, "counted")}
    assert counted == {"attic": 4, "barn": 4, "cellar": 4, "den": 2}
    assert den.adapter(Place("personal", 2, "den")).rank == 4, "it is on the broker still"
    assert fleet.aggregators[0].wait() == 0

    own = export_adapter(fleet.state, tmp_path / "den", device="den")
    assert own.version == 5
    assert export_adapter(fleet.state, tmp_path / "den", device="den", version=2).version == 2
    shared = export_adapter(fleet.state, tmp_path / "shared")
    assert shared.version == 5 and own.parameters == shared.parameters
    for device, version, said in (
        ("den", 3, "has no adapter of its own of version 3"),
        ("den", 3, "kept are 2, 5"),
        ("../attic", None, "it goes on with the shared one"),
    ):
        with pytest.raises(StoreError, match=said):
            export_adapter(fleet.state, tmp_path / "none", device=device, version=version)
