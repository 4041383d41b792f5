"""A device's answer to the public probe: the largest logits at each position, as bytes.

They travel behind the update, in the same file, as safetensors of two tensors: `indices` U32
(positions, k) and `values` F16 (positions, k).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol.errors import BadTensors
from protocol.messages import Probe
from protocol.tensors import pack, read_header, unpack

WINDOW_TOKENS = 64
"""The probe is predicted in windows of so many tokens (the job's `max_tokens`, if fewer),
each by itself: no device trains on shorter sequences, so all predict from the same."""
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class TopLogits:
    """Hold one adapter's k largest logits at each position of the public probe.

    `indices` and `values` are (positions, k): token ids, and their logits; all others count 0.
    """

    indices: npt.NDArray[np.integer]
    values: npt.NDArray[np.floating]


def encode_probe(answer: TopLogits) -> bytes:
    """Return a safetensors file; a logit that float16 does not reach is its largest number."""
    values = np.clip(answer.values, -LARGEST, LARGEST).astype("<f2")
    indices = np.ascontiguousarray(answer.indices, "<u4")
    return pack({"indices": ("U32", indices), "values": ("F16", values)})


def decode_probe(data: bytes | memoryview, probe: Probe) -> TopLogits:
    """Return the answer in a file from a stranger: `indices` uint32 and `values` float16.

    It may have fewer positions than the probe asks for, where the text has fewer tokens, and fewer
    logits at each, where the vocabulary has; how many is for who compares them.

    Raises:
        BadTensors: it is not two such tensors of one shape, a value is NaN or infinite, or a token
            stands twice at a position.
    """
    view = memoryview(data)
    places, _ = read_header(view)
    shape = places["values"][1] if "values" in places else ()
    most = (probe.positions, probe.top_k)
    if len(shape) != 2 or not all(1 <= n <= limit for n, limit in zip(shape, most, strict=True)):
        raise BadTensors(
            f"the answer to the probe is {shape}, where it is (positions, k) of at most {most}"
        )
    raw = unpack(view, {"indices": ("U32", shape), "values": ("F16", shape)})
    indices = np.frombuffer(raw["indices"], "<u4").reshape(shape).copy()
    values = np.frombuffer(raw["values"], "<f2").reshape(shape).copy()
    if not np.isfinite(values).all():
        raise BadTensors("the answer to the probe has a logit that is not finite")
    ordered = np.sort(indices, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise BadTensors("the answer to the probe names a token twice at a position")
    return TopLogits(indices, values)
