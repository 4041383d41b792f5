"""Answers to the probe as bytes: round trips, and strangers' bytes that are refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from pydantic import ValidationError

from protocol.errors import BadTensors
from protocol.messages import Probe, UploadManifest, describe_file
from protocol.probe import LARGEST, TopLogits, decode_probe, encode_probe
from protocol.tensors import encode, pack

PROBE = Probe(text="What all may read.", positions=3, top_k=2)
INDICES = np.array([[7, 1], [2, 3], [0, 70_000]], np.uint32)
VALUES = np.array([[1.5, -2.0], [0.25, 0.0], [8.0, 3.0]], np.float16)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_round_trip(positions: int, top_k: int) -> None:
    sent = TopLogits(INDICES[:positions, :top_k].astype(np.int64), VALUES[:positions, :top_k])
    got = decode_probe(encode_probe(sent), PROBE)
    assert (got.indices.dtype, got.values.dtype) == (np.uint32, np.float16)
    np.testing.assert_array_equal(got.indices, sent.indices)
    np.testing.assert_array_equal(got.values, sent.values)


def test_a_logit_beyond_float16_is_its_largest_number() -> None:
    got = decode_probe(encode_probe(TopLogits(INDICES[:1], np.array([[1e9, -1e9]]))), PROBE)
    np.testing.assert_array_equal(got.values, [[LARGEST, -LARGEST]])


def packed(indices: np.ndarray = INDICES, values: np.ndarray = VALUES) -> bytes:
    return pack({"indices": ("U32", indices), "values": ("F16", values)})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "too few"),
        (encode({"indices": VALUES, "values": VALUES}, "f32"), "'indices' is F32"),
        (pack({"values": ("F16", VALUES)}), "'indices' is missing"),
        (packed(INDICES[:2]), "'indices' is U32 (2, 2)"),
        (packed(np.zeros((4, 2), np.uint32), np.zeros((4, 2), np.float16)), "(4, 2)"),
        (packed(np.zeros((3, 3), np.uint32), np.zeros((3, 3), np.float16)), "at most (3, 2)"),
        (packed(INDICES[:0], VALUES[:0]), "(0, 2)"),
        (packed(INDICES[0], VALUES[0]), "(2,)"),
        (packed(values=np.full_like(VALUES, np.inf)), "not finite"),
        (packed(np.zeros_like(INDICES)), "names a token twice"),
        (packed() + b"more", "bytes of tensors"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadTensors, match=re.escape(said)):
        decode_probe(data, PROBE)


def test_a_file_is_not_shorter_than_the_answer_in_it() -> None:
    fields = {
        "job": "notes", "device": "phone", "upload": "0" * 32, "round": 1, "version": 1, "rank": 2,
        "rank_trained": 2, "held": 2, "encoding": "bf16", "examples": 1,
        "file": describe_file(b"four"),
    }  # fmt: skip
    assert UploadManifest(**fields, probe_bytes=4).probe_bytes == 4
    with pytest.raises(ValidationError, match="probe_bytes"):
        UploadManifest(**fields, probe_bytes=5)
