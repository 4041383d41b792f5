"""Tensor bytes: exact round trips, and strangers' bytes that are refused and never crash."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import BadTensors
from protocol.tensors import (
    HEADER_LIMIT_BYTES,
    ROW_SCALE,
    Encoding,
    bytes_each,
    decode,
    encode,
    round_trip,
    tensor_bytes,
)

ENCODINGS: list[Encoding] = ["f32", "bf16", "int8"]
EXPECTED = {"a": (2, 3), "b": (4, 2)}


def drawn(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in EXPECTED.items()}


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


GOOD = {"a": entry(0, 24, [2, 3]), "b": entry(24, 56, [4, 2])}
DATA = bytes(56)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_round_trip(encoding: Encoding) -> None:
    tensors = drawn()
    received = decode(encode(tensors, encoding), EXPECTED, encoding)
    assert list(received) == list(EXPECTED)
    for name, values in received.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, round_trip(tensors[name], encoding))


def test_f32_is_exact_and_the_result_is_the_callers_own() -> None:
    data = encode(drawn(), "f32")
    received = decode(memoryview(data), EXPECTED, "f32")
    np.testing.assert_array_equal(received["a"], drawn()["a"])
    received["a"] += 1  # writable: no view of the message


def test_bf16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0x3F00, 0x4000, dtype=np.uint32) << 16) | 0x8000
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, 3.4e38, -3.4e38], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    values = values[~np.isnan(values)].reshape(1, -1)
    theirs = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(
        round_trip(values, "bf16").view(np.uint32), theirs.view(np.uint32)
    )


def test_bf16_keeps_nan_a_nan() -> None:
    bits = np.array([[0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7FC00000]], np.uint32)
    assert np.isnan(round_trip(bits.view(np.float32), "bf16")).all()


def test_int8_is_within_half_a_step_of_each_row() -> None:
    values = np.random.default_rng(2).standard_normal((50, 40)).astype(np.float32)
    values *= np.logspace(-20, 20, 50, dtype=np.float32)[:, None]
    values[7] = 0
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    received = round_trip(values, "int8")
    assert (np.abs(received - values) <= step * 0.5001).all()
    assert not received[7].any()


@pytest.mark.parametrize("smallest", [1, 63, 64, 100, 190, 5000])
def test_int8_of_the_smallest_numbers_keeps_their_sign(smallest: int) -> None:
    """Near the end of float32 the scale itself is rounded by up to a half."""
    values = (np.array([[smallest, -smallest]]) * 2.0**-149).astype(np.float32)
    received = round_trip(values, "int8")
    assert received[0, 0] >= 0 >= received[0, 1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_safetensors_reads_the_files(encoding: Encoding) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load

    tensors = drawn()
    loaded = load(encode(tensors, encoding))
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[encoding]
    for name, values in tensors.items():
        found = loaded[name]
        assert found.dtype == dtype
        floats = found.to(torch.float32)
        if encoding == "int8":
            floats = floats * loaded[name + ROW_SCALE][:, None]
        np.testing.assert_array_equal(floats.numpy(), round_trip(values, encoding))
    assert set(loaded) - set(tensors) == (
        {n + ROW_SCALE for n in tensors} if encoding == "int8" else set()
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_each(encoding: Encoding) -> None:
    tensors = {"w": np.ones((64, 1024), np.float32)}
    size = len(encode(tensors, encoding))
    assert 0 <= size - 64 * 1024 * bytes_each(encoding) < 1000


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tensor_bytes_is_a_file_without_its_header(encoding: Encoding) -> None:
    """Row scales count: an update of many short rows has more bytes of them than of codes."""
    tensors = {"w": np.ones((3, 1000, 2), np.float32), **drawn()}
    data = encode(tensors, encoding)
    header = 8 + int.from_bytes(data[:8], "little")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert tensor_bytes(shapes, encoding) == len(data) - header


def test_files_that_others_write_may_carry_metadata_and_another_order() -> None:
    header = {"b": entry(0, 32, [4, 2]), "a": entry(32, 56, [2, 3]), "__metadata__": {"x": "y"}}
    assert set(decode(file_of(header, DATA), EXPECTED, "f32")) == {"a", "b"}


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "7 bytes": bytes(7),
    "no header": bytes(8),
    "header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "header longer than anything": b"\xff" * 8 + b"{}",
    "header beyond the limit": file_of(b" " * (HEADER_LIMIT_BYTES + 1), DATA),
    "not JSON": file_of(b"{", DATA),
    "not UTF-8": file_of(b'{"\xff": 1}', DATA),
    "nested without end": file_of(b"[" * 200_000, DATA),
    "a number of many digits": file_of(b'{"a": ' + b"9" * 10_000 + b"}", DATA),
    "a list": file_of([], DATA),
    "null": file_of(None, DATA),
    "a tensor twice": file_of(
        json.dumps(GOOD).replace('"b"', '"a"').encode(),
        DATA,
    ),
    "a key of an entry twice": file_of(
        json.dumps(GOOD).replace('"dtype"', '"dtype": "F32", "dtype"', 1).encode(), DATA
    ),
    "an entry that is a list": file_of(GOOD | {"a": [1, 2, 3]}, DATA),
    "an entry that is a number": file_of(GOOD | {"a": 1}, DATA),
    "an entry that is text": file_of(GOOD | {"a": "dtype"}, DATA),
    "an empty entry": file_of(GOOD | {"a": {}}, DATA),
    "one offset": file_of(GOOD | {"a": GOOD["a"] | {"data_offsets": [0]}}, DATA),
    "three offsets": file_of(GOOD | {"a": GOOD["a"] | {"data_offsets": [0, 24, 24]}}, DATA),
    "offsets of text": file_of(GOOD | {"a": GOOD["a"] | {"data_offsets": "ab"}}, DATA),
    "a negative offset": file_of(GOOD | {"a": entry(-24, 0, [2, 3])}, DATA),
    "a float offset": file_of(GOOD | {"a": GOOD["a"] | {"data_offsets": [0.0, 24.0]}}, DATA),
    "an offset that is NaN": file_of(
        json.dumps(GOOD).replace("[0, 24]", "[NaN, Infinity]").encode(), DATA
    ),
    "a huge offset": file_of(GOOD | {"b": entry(24, 1 << 80, [4, 2])}, DATA),
    "a boolean in the shape": file_of(
        {"a": entry(0, 24, [2, 3]), "b": entry(24, 56, [True])}, DATA
    ),
    "a shape that is a number": file_of(GOOD | {"a": GOOD["a"] | {"shape": 6}}, DATA),
    "a shape that is a map": file_of(GOOD | {"a": GOOD["a"] | {"shape": {"2": 3}}}, DATA),
    "a dtype that is a list": file_of(GOOD | {"a": GOOD["a"] | {"dtype": ["F32"]}}, DATA),
    "a missing tensor": file_of({"a": entry(0, 24, [2, 3])}, bytes(24)),
    "one tensor too many": file_of(GOOD | {"c": entry(56, 60, [1])}, bytes(60)),
    "another name": file_of({"a": GOOD["a"], "c": GOOD["b"]}, DATA),
    "a name of half a character": file_of(GOOD | {"\ud800": entry(56, 60, [1])}, bytes(60)),
    "another shape of as many numbers": file_of(GOOD | {"a": entry(0, 24, [3, 2])}, DATA),
    "another dimension": file_of(GOOD | {"a": entry(0, 24, [6])}, DATA),
    "another dtype": file_of(GOOD | {"a": entry(0, 24, [2, 3], "I32")}, DATA),
    "another float dtype": file_of(
        {"a": entry(0, 12, [2, 3], "BF16"), "b": entry(12, 28, [4, 2], "BF16")}, bytes(28)
    ),
    "an overlap": file_of(GOOD | {"b": entry(20, 52, [4, 2])}, bytes(52)),
    "both in one place": file_of(GOOD | {"b": entry(0, 32, [4, 2])}, bytes(32)),
    "a gap": file_of(GOOD | {"b": entry(28, 60, [4, 2])}, bytes(60)),
    "a gap below": file_of({"a": entry(4, 28, [2, 3]), "b": entry(28, 60, [4, 2])}, bytes(60)),
    "fewer bytes than its shape": file_of(GOOD | {"b": entry(24, 52, [4, 2])}, bytes(52)),
    "offsets the wrong way round": file_of(GOOD | {"a": entry(24, 0, [2, 3])}, DATA),
    "cut off": file_of(GOOD, bytes(55)),
    "bytes at the end": file_of(GOOD, bytes(57)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str) -> None:
    with pytest.raises(BadTensors) as caught:
        decode(HOSTILE[case], EXPECTED, "f32")
    assert str(caught.value).encode()  # it can be printed and sent back


def test_the_hostile_files_are_near_to_a_good_one() -> None:
    assert set(decode(file_of(GOOD, DATA), EXPECTED, "f32")) == {"a", "b"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", ["f32", "bf16"])
def test_values_that_are_not_finite_are_refused(encoding: Encoding, value: float) -> None:
    tensors = drawn()
    tensors["b"][3, 1] = value
    with pytest.raises(BadTensors, match=r"'b'.*not finite"):
        decode(encode(tensors, encoding), EXPECTED, encoding)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 3e38])
def test_row_scales_that_are_not_finite_are_refused(scale: float) -> None:
    """Also of a row of zeros, where 0·∞ is NaN, and a finite scale that overflows."""
    tensors = {"a": np.array([[0, 0, 0], [1, 2, 127]], np.float32), "b": drawn()["b"]}
    data = bytearray(encode(tensors, "int8"))
    size = int.from_bytes(data[:8], "little")
    first = json.loads(data[8 : 8 + size])["a" + ROW_SCALE]["data_offsets"][0] + 8 + size
    data[first : first + 8] = np.full(2, scale, "<f4").tobytes()
    with pytest.raises(BadTensors, match="not finite"):
        decode(bytes(data), EXPECTED, "int8")


def refused_or_read(data: bytes, encoding: Encoding) -> None:
    try:
        tensors = decode(data, EXPECTED, encoding)
    except BadTensors:
        return
    assert {n: t.shape for n, t in tensors.items()} == EXPECTED
    assert all(np.isfinite(t).all() for t in tensors.values())


SEEDS = {e: encode(drawn(), e) for e in ENCODINGS}


@settings(max_examples=400, deadline=None)
@given(
    encoding=st.sampled_from(ENCODINGS),
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40),
    tail=st.binary(max_size=8),
)
def test_mutated_bytes_are_refused_or_read(
    encoding: Encoding, edits: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    data = bytearray(SEEDS[encoding])
    for place, value in edits:
        data[place % len(data)] = value
    refused_or_read(bytes(data[: len(data) - cut]) + tail, encoding)


@settings(max_examples=200, deadline=None)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=3
                )
            ),
            max_leaves=8,
        ),
    ),
    data=st.binary(max_size=64),
)
def test_any_header_is_refused_or_read(header: dict[str, Any], data: bytes) -> None:
    refused_or_read(file_of(header, data), "f32")
