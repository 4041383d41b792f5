"""Which adapters a device goes on with, which it tries and in which order, and what it tells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from aggregator.merge import Update
from aggregator.merge.round_view import completed
from aggregator.personal import STRATEGIES
from edge_client.download import Source
from edge_client.holding import Holding
from edge_client.learning import Learned, learn
from edge_client.outbox import Outbox
from edge_client.personal import full_adapter
from edge_client.trainer.base import TrainReport
from edge_client.trying import Trying, to_try
from protocol import topics
from protocol.adapter import Adapter, Factors, add, initial_adapter, module_directions, select
from protocol.bands import bands
from protocol.errors import MalformedMessage, Replayed
from protocol.messages import GlobalManifest, describe_file
from tests.edge_client.test_outbox_download import MODULES, make_job, manifest

JOB = make_job(rule="trust-validation", ladder=[2, 4, 8])
EVERY = tuple(bands(JOB.ladder))
INFINITE = math.inf


def heading(version: int = 3, **more: object) -> GlobalManifest:
    sizes = {"0-2": bytes(100), "2-4": bytes(100), "4-8": bytes(200)}
    files = {name: describe_file(data) for name, data in sizes.items()}
    common = {"job": "notes", "version": version, "parent": version - 1, "encoding": "f32"}
    return GlobalManifest.model_validate({**common, "bands": files, **more})


def named(sources: list[Source]) -> list[str]:
    return [str(source).removesuffix(" of version 3") for source in sources]


# -- what is tried -----------------------------------------------------------------------------


def test_a_personal_job_is_one_of_a_trust_strategy() -> None:
    for rule in STRATEGIES:
        assert make_job(rule=rule).is_personal
    assert not make_job(rule="anchored").is_personal


def test_the_trial_comes_first_then_candidates_in_an_order_of_each_devices_own() -> None:
    offer = heading(trials=["phone", "tablet"], candidates=6)
    orders = {}
    for device in ("phone", "tablet", "laptop"):
        tried = named(to_try(offer, device, EVERY, INFINITE))
        if device != "laptop":
            assert tried.pop(0) == "the trial"
        assert sorted(tried) == [f"candidate {n}" for n in range(6)]
        orders[device] = tuple(tried)
        assert named(to_try(offer, device, EVERY, INFINITE))[-6:] == tried, "the same again"
    assert len(set(orders.values())) == 3
    assert orders["phone"] != tuple(named(to_try(heading(4, candidates=6), "phone", EVERY, 1e9)))


@pytest.mark.parametrize(
    ("budget", "held", "count"),
    [(0, 3, 0), (799, 3, 0), (800, 3, 1), (1600, 3, 3), (1600, 1, 5), (INFINITE, 3, 5)],
)
def test_what_is_tried_fits_the_link_with_the_bands_that_are_held(
    budget: float, held: int, count: int
) -> None:
    # 400 bytes each with all bands, 100 with the first
    offer = heading(trials=["phone"], candidates=4)
    tried = to_try(offer, "phone", EVERY[:held], budget)
    assert len(tried) == count
    assert named(tried[:1]) == ["the trial"][:count]


def test_nothing_is_tried_where_nothing_is_offered() -> None:
    assert to_try(heading(trials=["tablet"]), "phone", EVERY, INFINITE) == []


def test_what_is_told_is_what_was_found() -> None:
    sources = to_try(heading(trials=["phone"], candidates=3), "phone", EVERY, INFINITE)
    trying = Trying(3, sources, received=2.5, own=2.25)
    assert trying.next is not None and trying.next.kind == "trial"
    trying.found(2.4)
    trying.found(3.0)
    trying.skip()
    trying.found(2.0)
    assert trying.next is None
    answer = trying.answer()
    assert answer is not None
    assert (answer.received, answer.own, answer.trial) == (2.5, 2.25, 2.4)
    assert answer.candidates == {sources[1].number: 3.0, sources[3].number: 2.0}


def test_without_a_loss_to_compare_with_nothing_is_told() -> None:
    assert Trying(3, [], received=math.nan, own=2.0).answer() is None


# -- which adapter is held ---------------------------------------------------------------------


def test_sources_have_their_topics_and_no_others() -> None:
    sources = [
        Source("notes", "phone", "global", 3),
        Source("notes", "phone", "personal", 2),
        Source("notes", "phone", "trial", 3),
        Source("notes", "phone", "candidate", 3, 1),
    ]
    theirs = [
        "tunefleet/1/notes/global/3/manifest",
        "tunefleet/1/notes/d/phone/global/2/manifest",
        "tunefleet/1/notes/d/phone/trial/3/manifest",
        "tunefleet/1/notes/candidate/3/1/manifest",
    ]
    assert [source.manifest_topic for source in sources] == theirs
    chunks = [source.chunk_topics(EVERY[1:2])[0].replace("+", "0") for source in sources]
    assert chunks == [name.replace("manifest", "2-4/0") for name in theirs]
    others = [
        "tunefleet/1/notes/d/phone/status",
        "tunefleet/1/notes/d/tablet/global/2/manifest",
        "tunefleet/1/notes/candidate/3/2/manifest",
        "tunefleet/1/notes/candidate/4/1/manifest",
        "tunefleet/1/notes/candidate/03/1/manifest",
    ]
    for source, manifest_topic, chunk in zip(sources, theirs, chunks, strict=True):
        found = [n for n in (*theirs, *chunks, *others) if source.has(topics.match(n))]
        assert found == [manifest_topic, chunk]


def held_after(holding: Holding, first: GlobalManifest) -> Source | None:
    holding.begin(first)
    return holding.missing(first.version)


def test_a_device_goes_on_with_its_own_adapter_where_the_common_manifest_names_it() -> None:
    holding = Holding(JOB, "phone")
    adapter = initial_adapter(MODULES, 8, 1.0, 0)
    common = Source("notes", "phone", "global", 3)
    assert holding.missing(3) == common, "its manifest"
    assert held_after(holding, heading(3, personal={"tablet": 3})) == common
    holding.install(common, adapter, EVERY)
    assert (holding.missing(3), holding.version, holding.personal) == (None, 3, None)

    own = Source("notes", "phone", "personal", 4)
    assert held_after(holding, heading(4, personal={"phone": 4, "tablet": 3})) == own
    assert holding.version == 3, "not before it is complete"
    holding.install(own, adapter, EVERY)
    assert (holding.missing(4), holding.version, holding.personal) == (None, 4, 4)
    assert holding.missing(5) == holding.common_of(5)
    assert held_after(holding, heading(5, personal={"phone": 4})) is None, "it has that one"
    assert (holding.version, holding.personal) == (5, 4)
    assert held_after(holding, heading(6)) == holding.common_of(6), "it has left `personal`"
    holding.install(holding.common_of(6), adapter, EVERY)
    assert holding.personal is None


def test_an_adapter_of_a_later_version_than_the_manifest_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="an adapter of version 4"):
        Holding(JOB, "phone").begin(heading(3, personal={"phone": 4}))


def test_an_own_adapter_is_never_followed_by_an_older_one(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for version in (2, 2, 5):
        outbox.check_personal("notes", version)
    outbox.close()
    outbox = Outbox(tmp_path)
    with pytest.raises(Replayed, match="personal version 4 of job 'notes' is older"):
        outbox.check_personal("notes", 4)
    outbox.check_personal("other", 1)
    outbox.close()


# -- what training left ------------------------------------------------------------------------


def test_the_loss_after_training_is_kept_over_restarts_unless_the_update_was_refused(
    tmp_path: Path,
) -> None:
    outbox = Outbox(tmp_path)
    assert outbox.own_loss("notes", 1) is None
    outbox.put(manifest(1), b"data", rank=8, own_loss=2.5)
    outbox.close()
    outbox = Outbox(tmp_path)
    assert outbox.own_loss("notes", 1) == 2.5
    assert outbox.own_loss("notes", 2) is None
    assert outbox.own_loss("other", 1) is None
    outbox.drop(manifest(1).upload)
    assert outbox.own_loss("notes", 1) == 2.5, "counted"
    outbox.put(manifest(2), b"data", rank=8, own_loss=2.25)
    outbox.refuse(manifest(2))
    assert outbox.own_loss("notes", 1) is None
    outbox.put(manifest(3), b"data", rank=8, own_loss=2.0)
    outbox.put(manifest(4), b"data", rank=8)
    assert outbox.own_loss("notes", 1) is None, "that of the last one was not measured"
    outbox.close()


@pytest.mark.parametrize("directions", ["top", "rotating"])
def test_the_full_adapter_is_the_one_that_the_aggregator_sees(directions: str) -> None:
    job = make_job(ladder=[2, 4, 8], directions=directions, pruning={"enabled": False})
    held = initial_adapter(MODULES, 8, job.scale, 0)
    rng = np.random.default_rng(0)

    def moved(received: Adapter, _: Adapter | None) -> tuple[Adapter, TrainReport]:
        step = {
            n: Factors(
                rng.standard_normal(f.a.shape).astype(np.float32),
                rng.standard_normal(f.b.shape).astype(np.float32),
            )
            for n, f in received.layers.items()
        }
        return add(received, Adapter(step, job.scale)), TrainReport(1, 10, 1.0, 0.0)

    learned: Learned = learn(job, "phone", held, 4, 7, moved)
    full = full_adapter(held, learned)
    chosen = module_directions(
        MODULES, directions, job="notes", device="phone", round_number=7, rank_trained=4, held=8
    )
    update = Update("phone", add(select(held, chosen), learned.change), chosen, 10, {})
    for name, expected in completed(update, held).adapter.layers.items():
        np.testing.assert_array_equal(full.layers[name].a, expected.a)
        np.testing.assert_array_equal(full.layers[name].b, expected.b)
