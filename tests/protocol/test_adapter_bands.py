"""Directions, slices and bands of an adapter: what both sides must compute alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from protocol.adapter import (
    Adapter,
    Factors,
    add,
    difference,
    directions,
    initial_adapter,
    module_directions,
    module_rank,
    parameter_count,
    select,
    without,
)
from protocol.bands import (
    Band,
    Stack,
    affordable,
    band_parameters,
    band_ranks,
    bands,
    covering,
    cut,
    join,
    parse_band,
    read_adapter,
    stacks,
    stored_layers,
    to_tensors,
)
from protocol.errors import BadTensors, ProtocolError
from protocol.tensors import Encoding, bytes_each, encode, round_trip

LADDER = [2, 4, 8, 16, 32, 64]
SHAPES = {"wide": (48, 40), "narrow": (40, 3), "thin": (5, 48)}
"""Two of the modules are narrower than most ranks of the ladder."""
TINY_MODEL = Path(__file__).parents[2] / "base_tiny" / "model" / "model.safetensors"


def drawn(shapes: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    ranks = {name: module_rank(shape, rank) for name, shape in shapes.items()}
    layers = {
        name: Factors(normal(ranks[name], d_in), normal(d_out, ranks[name]))
        for name, (d_out, d_in) in shapes.items()
    }
    return Adapter(layers, 0.5)


def product(factors: Factors) -> np.ndarray:
    return np.asarray(factors.b @ factors.a)


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.scale == other.scale
    assert list(one.layers) == list(other.layers)
    for name, factors in one.layers.items():
        np.testing.assert_array_equal(factors.a, other.layers[name].a)
        np.testing.assert_array_equal(factors.b, other.layers[name].b)


def tiny_shapes() -> dict[str, tuple[int, int]]:
    """Return the linear modules of base-tiny's blocks, from the file's header."""
    with TINY_MODEL.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name.removesuffix(".weight"): (entry["shape"][0], entry["shape"][1])
        for name, entry in header.items()
        if ".layers." in name and len(entry["shape"]) == 2
    }


def draw(round_number: int, *, device: str = "pi", rank: int = 4, held: int = 16) -> list[int]:
    return directions(
        "rotating", job="demo", device=device, round_number=round_number, rank=rank, held=held
    )


def test_directions_are_the_documented_draw() -> None:
    # Fixed values: another implementation, or a later release, has to draw the same.
    import hashlib

    for number in range(5):
        digests = [hashlib.sha256(f"demo|pi|{number}|{i}".encode()).digest() for i in range(16)]
        smallest = sorted(range(16), key=digests.__getitem__)[:4]
        assert draw(number) == draw(number) == sorted(smallest)


def test_directions_rotate_over_rounds_and_devices() -> None:
    assert len({tuple(draw(n)) for n in range(20)}) > 10
    assert len({tuple(draw(0, device=f"pi-{n}")) for n in range(20)}) > 10
    assert {i for n in range(40) for i in draw(n)} == set(range(16))


def test_directions_of_a_device_that_trains_all_it_holds() -> None:
    assert draw(1, rank=16) == draw(1, rank=99) == list(range(16))
    assert directions("top", job="j", device="d", round_number=3, rank=3, held=8) == [0, 1, 2]
    assert directions("top", job="j", device="d", round_number=3, rank=9, held=2) == [0, 1]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="rotating"):
        directions("sideways", job="j", device="d", round_number=0, rank=1, held=2)


def chosen_of(round_number: int = 1, rank: int | None = None) -> dict[str, np.ndarray]:
    return module_directions(
        SHAPES,
        "rotating",
        job="demo",
        device="pi",
        round_number=round_number,
        rank_trained=4,
        held=16,
        rank=rank,
    )


def test_module_directions_are_deterministic_and_fit_narrow_modules() -> None:
    one, again = chosen_of(), chosen_of()
    assert {n: v.tolist() for n, v in one.items()} == {n: v.tolist() for n, v in again.items()}
    assert one["wide"].tolist() == draw(1)
    assert one["thin"].tolist() == draw(1, held=5)
    assert one["narrow"].tolist() == [0, 1, 2]
    assert any(chosen_of(n)["wide"].tolist() != one["wide"].tolist() for n in range(2, 6))


def test_a_device_that_prunes_itself_keeps_the_first_of_those_it_trained() -> None:
    whole, pruned = chosen_of(), chosen_of(rank=2)
    assert {n: v[:2].tolist() for n, v in whole.items()} == {
        n: v.tolist() for n, v in pruned.items()
    }


@pytest.mark.parametrize("round_number", range(4))
def test_select_and_without_part_the_product(round_number: int) -> None:
    adapter = drawn(SHAPES, 16)
    chosen = chosen_of(round_number)
    trained, frozen = select(adapter, chosen), without(adapter, chosen)
    for name, factors in adapter.layers.items():
        part, rest = trained.layers[name], frozen.layers[name]
        assert part.rank + rest.rank == factors.rank
        np.testing.assert_allclose(
            product(part) + product(rest), product(factors), rtol=1e-4, atol=1e-4
        )
        rows = np.concatenate([part.a, rest.a])
        assert {r.tobytes() for r in rows} == {r.tobytes() for r in factors.a}


def test_add_undoes_difference() -> None:
    before, after = drawn(SHAPES, 8, seed=1), drawn(SHAPES, 8, seed=2)
    restored = add(before, difference(after, before))
    for name, factors in after.layers.items():
        np.testing.assert_allclose(restored.layers[name].a, factors.a, atol=1e-6)
        np.testing.assert_allclose(restored.layers[name].b, factors.b, atol=1e-6)
    nothing = difference(after, after)
    assert_same(add(after, nothing), after)


def test_version_0_has_orthonormal_rows_a_zero_product_and_depends_on_seed_and_name() -> None:
    one, again = (initial_adapter(SHAPES, 8, 0.5, seed=7) for _ in range(2))
    assert_same(one, again)
    for name, factors in one.layers.items():
        assert factors.rank == module_rank(SHAPES[name], 8)
        np.testing.assert_allclose(factors.a @ factors.a.T, np.eye(factors.rank), atol=1e-5)
        assert not product(factors).any()
    alone = initial_adapter({"wide": SHAPES["wide"]}, 8, 0.5, seed=7)
    np.testing.assert_array_equal(alone.layers["wide"].a, one.layers["wide"].a)
    other = initial_adapter(SHAPES, 8, 0.5, seed=8)
    assert not np.array_equal(other.layers["wide"].a, one.layers["wide"].a)


def test_truncated_is_the_first_directions() -> None:
    adapter = drawn(SHAPES, 16)
    assert adapter.rank == 16
    short = adapter.truncated(4)
    assert {n: f.rank for n, f in short.layers.items()} == {"wide": 4, "narrow": 3, "thin": 4}
    np.testing.assert_array_equal(short.layers["wide"].b, adapter.layers["wide"].b[:, :4])


@pytest.mark.parametrize("rank", LADDER)
def test_parameter_count_counts(rank: int) -> None:
    adapter = drawn(SHAPES, rank)
    assert parameter_count(SHAPES, rank) == sum(
        f.a.size + f.b.size for f in adapter.layers.values()
    )


def test_bands_of_a_ladder_and_their_names() -> None:
    assert bands([2, 4, 8]) == [Band(0, 2), Band(2, 4), Band(4, 8)]
    assert bands([3]) == [Band(0, 3)]
    assert [parse_band(b.name) for b in bands(LADDER)] == bands(LADDER)


@pytest.mark.parametrize("name", ["", "4", "-", "4-", "-8", "8-4", "4-4", "a-b", "1-2-3", "4- 8"])
def test_what_is_not_a_band_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="rank band"):
        parse_band(name)


def test_bands_go_over_the_wire_and_join_to_the_same_adapter() -> None:
    adapter = drawn(SHAPES, 64)
    received = {}
    for band in bands(LADDER):
        ranks = band_ranks(SHAPES, band)
        tensors = to_tensors(cut(adapter, band))
        assert {n: t.shape for n, t in tensors.items()} == shapes_of(stacks(SHAPES, ranks))
        assert band_parameters(SHAPES, band) == sum(t.size for t in tensors.values())
        received[band] = read_adapter(encode(tensors, "f32"), SHAPES, ranks, adapter.scale, "f32")
    # Nothing of the module of rank 3 lies in a band above it.
    assert band_ranks(SHAPES, Band(4, 8))["narrow"] == 0
    assert_same(join(dict(reversed(received.items())), adapter.scale), adapter)
    low = {b: received[b] for b in covering(LADDER, 8)}
    assert_same(join(low, adapter.scale), adapter.truncated(8))


def test_join_names_a_missing_band() -> None:
    adapter = drawn(SHAPES, 8)
    parts = {b: cut(adapter, b) for b in bands([2, 4, 8])}
    for gone, named in [(Band(2, 4), "2-4"), (Band(0, 2), "0-2")]:
        with pytest.raises(ProtocolError, match=named):
            join({b: p for b, p in parts.items() if b != gone}, 0.5)
    assert join({}, 0.5).layers == {}


def test_covering_takes_what_the_rank_needs_and_no_more() -> None:
    assert covering(LADDER, 1) == covering(LADDER, 2) == [Band(0, 2)]
    assert covering(LADDER, 3) == [Band(0, 2), Band(2, 4)]
    assert covering(LADDER, 64) == bands(LADDER)


def test_affordable_takes_its_own_rank_whatever_it_costs_and_more_as_the_link_allows() -> None:
    def afford(budget: float) -> list[Band]:
        return affordable(SHAPES, LADDER, rank=4, byte_budget=budget, bytes_each=2)

    up_to = {r: parameter_count(SHAPES, r) * 2 for r in LADDER}
    assert afford(0) == covering(LADDER, 4)
    assert afford(up_to[8] - 1) == covering(LADDER, 4)
    assert afford(up_to[8]) == covering(LADDER, 8)
    assert afford(up_to[32]) == covering(LADDER, 32)
    assert afford(float("inf")) == bands(LADDER)


ALIKE = {"l.10.q": (6, 5), "l.2.q": (6, 5), "l.2.k": (3, 5), "l.2.o": (5, 6)}
"""Modules of equal shape and of unequal shape, not in the order of their names."""


def shapes_of(expected: list[Stack]) -> dict[str, tuple[int, ...]]:
    return {s.name: s.shape for s in expected}


def ranks_of(rank: int) -> dict[str, int]:
    return {name: module_rank(shape, rank) for name, shape in ALIKE.items()}


def test_equal_factors_are_stacked_in_the_order_of_their_modules_names() -> None:
    # Fixed names: another implementation, or a later release, has to write the same.
    found = stacks(ALIKE, ranks_of(4))
    assert shapes_of(found) == {
        "A.3x5": (1, 3, 5),
        "B.3x3": (1, 3, 3),
        "A.4x6": (1, 4, 6),
        "B.5x4": (1, 5, 4),
        "A.4x5": (2, 4, 5),
        "B.6x4": (2, 6, 4),
    }
    assert {s.modules for s in found if s.name in ("A.4x5", "B.6x4")} == {("l.10.q", "l.2.q")}
    adapter = drawn(ALIKE, 4)
    tensors = to_tensors(adapter)
    np.testing.assert_array_equal(tensors["B.6x4"][1], adapter.layers["l.2.q"].b)
    assert to_tensors(drawn(ALIKE, 0)) == {}
    assert stacks(ALIKE, ranks_of(0)) == []


@pytest.mark.parametrize("encoding", ["f32", "bf16", "int8"])
def test_an_adapter_goes_over_the_wire(encoding: Encoding) -> None:
    """Each row of each module is encoded by itself, stacked or not."""
    sent = drawn(ALIKE, 4)
    data = encode(to_tensors(sent), encoding)
    received = read_adapter(data, ALIKE, ranks_of(4), sent.scale, encoding)
    expected = {
        name: Factors(round_trip(f.a, encoding), round_trip(f.b, encoding))
        for name, f in sent.layers.items()
    }
    assert_same(received, Adapter(expected, sent.scale))


def read_changed(tensors: dict[str, np.ndarray], encoding: Encoding = "f32") -> None:
    read_adapter(encode(tensors, encoding), ALIKE, ranks_of(4), 0.5, "f32")


def test_what_is_wrong_with_a_file_names_the_module() -> None:
    good = to_tensors(drawn(ALIKE, 4))
    read_changed(good)
    for value in (np.nan, -np.inf):
        bad = good["B.6x4"].copy()
        bad[1, 5, 3] = value
        with pytest.raises(BadTensors, match=r"'B\.6x4' \(l\.2\.q\) has .* not finite"):
            read_changed({**good, "B.6x4": bad})
    with pytest.raises(
        BadTensors, match=r"\(l\.10\.q and 1 more\) is F32 \(1, 6, 4\), .*\(2, 6, 4\)"
    ):
        read_changed({**good, "B.6x4": good["B.6x4"][:1]})
    with pytest.raises(BadTensors, match=r"\(l\.10\.q and 1 more\) is BF16 .* imply F32"):
        read_changed(good, "bf16")
    with pytest.raises(BadTensors, match=r"\(l\.2\.k\) is missing$"):
        read_changed({n: t for n, t in good.items() if n != "A.3x5"})
    with pytest.raises(
        BadTensors, match=r"\(l\.10\.q and 1 more\) is missing; tensor '[AB]\.\dx\d' is not part"
    ):
        read_changed(to_tensors(drawn(ALIKE, 2)))
    with pytest.raises(BadTensors, match=r"^tensor 'C\.1x1' is not part of this job and rank$"):
        read_changed({**good, "C.1x1": np.zeros((1, 1, 1), np.float32)})


def test_a_small_device_downloads_an_eighth_of_what_a_large_one_does() -> None:
    """A device of rank 2 with the remainder dropped, whole files with their headers."""
    shapes = tiny_shapes()
    assert len(shapes) == 42
    adapter = drawn(shapes, 64)

    def downloaded(rank: int) -> int:
        return sum(
            len(encode(to_tensors(cut(adapter, band)), "bf16")) for band in covering(LADDER, rank)
        )

    assert downloaded(2) <= downloaded(64) / 8


@pytest.mark.parametrize("encoding", ["f32", "bf16"])
@pytest.mark.parametrize("rank", LADDER)
def test_a_file_is_hardly_more_than_its_numbers(rank: int, encoding: Encoding) -> None:
    """An upload of a rank, or a band of as many directions; base-tiny is as narrow as any."""
    shapes = tiny_shapes()
    size = len(encode(to_tensors(drawn(shapes, rank)), encoding))
    assert 0 < size - bytes_each(encoding) * parameter_count(shapes, rank) <= 600
    assert size <= 1.05 * bytes_each(encoding) * parameter_count(shapes, rank)


@pytest.mark.parametrize("encoding", ["f32", "bf16", "int8"])
def test_stored_layers_are_what_the_whole_file_holds(encoding: Encoding, tmp_path: Path) -> None:
    shapes = SHAPES | {"wide too": SHAPES["wide"], "left out": (30, 20)}
    adapter = drawn(shapes, 8)
    adapter = Adapter(
        adapter.layers | {"left out": adapter.layers["left out"].take(slice(0))}, adapter.scale
    )
    ranks = {name: f.rank for name, f in adapter.layers.items()}
    data, path = encode(to_tensors(adapter), encoding), tmp_path / "update"
    path.write_bytes(data + b"an answer to a probe")
    whole = read_adapter(data, shapes, ranks, 0.5, encoding)
    lazy = stored_layers(path, len(data), shapes, ranks, encoding)
    assert (set(lazy), len(lazy)) == (set(shapes), len(shapes))
    for name in shapes:
        np.testing.assert_array_equal(lazy[name].a, whole.layers[name].a)
        np.testing.assert_array_equal(lazy[name].b, whole.layers[name].b)
    with pytest.raises(KeyError):
        lazy["nobody"]
    path.write_bytes(data[:-4])
    with pytest.raises(BadTensors, match="shorter than its header"):
        [lazy[name] for name in shapes]
    with pytest.raises(BadTensors, match="bytes of tensors"):
        stored_layers(path, len(data), shapes, ranks, encoding)
