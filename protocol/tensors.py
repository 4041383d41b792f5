"""Tensors as bytes: safetensors in three encodings, read only after its header was believed.

`f32` and `bf16` are plain safetensors. `int8` stores each row (of the last axis) as int8 with a
float32 scale of its own in a second tensor named `{name}.row_scale`; what its rounding loses is
lost. https://huggingface.co/docs/safetensors describes the file format.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import safetensors

from protocol.errors import BadTensors

Encoding = Literal["f32", "bf16", "int8"]
HEADER_LIMIT_BYTES = 1 << 20
ROW_SCALE = ".row_scale"
Parts = Mapping[str, Sequence[str]]
"""Tensor name → what people call each of its parts along the first axis."""
NO_PARTS: Parts = MappingProxyType({})
_SIZE = {"F32": 4, "BF16": 2, "I8": 1, "U32": 4, "F16": 2}
_DTYPE = {"F32": "float32", "BF16": "bfloat16", "I8": "int8", "U32": "uint32", "F16": "float16"}


def bytes_each(encoding: Encoding) -> int:
    """Return the bytes that one number takes, row scales and header aside."""
    return {"f32": 4, "bf16": 2, "int8": 1}[encoding]


def tensor_bytes(expected: Mapping[str, tuple[int, ...]], encoding: Encoding) -> int:
    """Return the bytes of a file's tensors, row scales included, its header aside."""
    announced = _announced(expected, encoding).values()
    return sum(math.prod(shape) * _SIZE[dtype] for dtype, shape in announced)


def encode(tensors: Mapping[str, np.ndarray], encoding: Encoding) -> bytes:
    """Return a safetensors file of float tensors."""
    stored: dict[str, tuple[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        values = np.ascontiguousarray(tensor, np.float32)
        if encoding == "f32":
            stored[name] = ("F32", values)
        elif encoding == "bf16":
            stored[name] = ("BF16", _to_bf16(values))
        else:
            codes, scales = _to_int8(values)
            stored[name] = ("I8", codes)
            stored[name + ROW_SCALE] = ("F32", scales)
    return pack(stored)


def pack(stored: Mapping[str, tuple[str, np.ndarray]]) -> bytes:
    """Return a safetensors file of arrays with the dtypes that the file calls them by."""
    specs = {
        name: safetensors.TensorSpec(
            dtype=_DTYPE[dtype],
            shape=list(data.shape),
            data_ptr=data.ctypes.data,  # `stored` keeps the array alive
            data_len=data.nbytes,
        )
        for name, (dtype, data) in stored.items()
    }
    return bytes(safetensors.serialize(specs, metadata=None))


def decode(
    data: bytes | memoryview,
    expected: Mapping[str, tuple[int, ...]],
    encoding: Encoding,
    *,
    parts: Parts = NO_PARTS,
) -> dict[str, np.ndarray]:
    """Return the float32 tensors of a file from a stranger.

    Before any tensor is read the header must be within its limit and hold exactly the `expected`
    names, with their shapes and the dtypes of `encoding`, laid out without gap or overlap. Errors
    name the `parts` of a tensor too.

    Raises:
        BadTensors: something is not as announced, or a value is NaN or infinite.
    """
    view = memoryview(data)
    announced = _announced(expected, encoding)
    raw = unpack(view, announced, parts=parts)
    tensors = {}
    for name, shape in expected.items():
        tensor = _read(name, shape, raw, encoding)
        finite = np.isfinite(tensor)
        if not finite.all():
            first = int(np.unravel_index(np.argmin(finite), shape)[0])
            raise BadTensors(f"{_called(name, parts, first)} has a value that is not finite")
        tensors[name] = tensor
    return tensors


def unpack(
    view: memoryview,
    announced: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    parts: Parts = NO_PARTS,
) -> dict[str, memoryview]:
    """Return the bytes of each tensor of a file that must have just these, dtype and shape.

    Raises:
        BadTensors: its header or its layout is another.
    """
    places = _located(view, announced, parts)
    return {name: view[first:last] for name, (first, last) in places.items()}


class TensorFile:
    """Read a file's tensors a slice at a time, those of the first axis; between two it is closed.

    `decode` has taken its first `size` bytes: their header is checked anew, values are not.

    Raises:
        BadTensors: the header is not as `expected`, or the file is shorter than it was.
        OSError: it can't be read.
    """

    def __init__(
        self, path: Path, size: int, expected: Mapping[str, tuple[int, ...]], encoding: Encoding
    ) -> None:
        self._path, self._expected, self._encoding = path, expected, encoding
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
            memoryview(whole) as view,
            view[:size] as part,
        ):
            self._places = _located(part, _announced(expected, encoding), NO_PARTS)

    def read(self, name: str, index: int) -> np.ndarray:
        """Return slice `index` of a tensor, as float32."""
        raw: dict[str, memoryview] = {}
        count, *shape = self._expected[name]
        with self._path.open("rb") as file:
            for stored in (name, name + ROW_SCALE):
                if stored in self._places:
                    first, last = self._places[stored]
                    size = (last - first) // count
                    file.seek(first + index * size)
                    raw[stored] = memoryview(file.read(size))
                    if len(raw[stored]) < size:
                        raise BadTensors(f"{self._path} is shorter than its header says")
        return _read(name, tuple(shape), raw, self._encoding)


def round_trip(tensor: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Return what the receiver of a tensor will see."""
    values = np.ascontiguousarray(tensor, np.float32)
    if encoding == "bf16":
        return _from_bf16(_to_bf16(values))
    if encoding == "int8":
        codes, scales = _to_int8(values)
        restored: np.ndarray = codes.astype(np.float32) * scales[..., None]
        return restored
    return values


Place = tuple[str, tuple[int, ...], int, int]
"""dtype, shape, first byte and last byte + 1 of a tensor, counted from the end of the header."""


def _located(
    view: memoryview, announced: Mapping[str, tuple[str, tuple[int, ...]]], parts: Parts
) -> dict[str, tuple[int, int]]:
    """Return the first byte and last byte + 1 of each tensor in a file, its header checked."""
    places, start = read_header(view)
    missing = [f"{_called(n, parts)} is missing" for n in announced if n not in places]
    extra = [f"tensor {n!a} is not part of this job and rank" for n in places if n not in announced]
    if missing or extra:
        raise BadTensors("; ".join([*missing[:1], *extra[:1]]))
    _check_layout(places, announced, len(view) - start, parts)
    return {name: (start + a, start + b) for name, (_, _, a, b) in places.items()}


def _announced(
    expected: Mapping[str, tuple[int, ...]], encoding: Encoding
) -> dict[str, tuple[str, tuple[int, ...]]]:
    dtype = {"f32": "F32", "bf16": "BF16", "int8": "I8"}[encoding]
    announced: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (dtype, tuple(shape)) for name, shape in expected.items()
    }
    if encoding == "int8":
        announced |= {name + ROW_SCALE: ("F32", shape[:-1]) for name, shape in expected.items()}
    return announced


def _called(name: str, parts: Parts, part: int | None = None) -> str:
    """Return how an error names a tensor: with one of its parts, or the first and their number."""
    known = parts.get(name.removesuffix(ROW_SCALE), ())
    if not known:
        return f"tensor {name!r}"
    if part is not None:
        return f"tensor {name!r} ({known[part]})"
    return f"tensor {name!r} ({known[0]}{f' and {len(known) - 1} more' if len(known) > 1 else ''})"


def read_header(view: memoryview) -> tuple[dict[str, Place], int]:
    """Parse the header of a safetensors file into places and the offset of its data.

    Raises:
        BadTensors: it is not one.
    """
    if len(view) < 8:
        raise BadTensors(f"{len(view)} bytes are too few for a safetensors file")
    size = int.from_bytes(view[:8], "little")
    if size > HEADER_LIMIT_BYTES or size > len(view) - 8:
        raise BadTensors(f"its header claims {size} bytes (limit {HEADER_LIMIT_BYTES})")
    try:
        header = json.loads(bytes(view[8 : 8 + size]), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadTensors(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise BadTensors("its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _place(name, entry) for name, entry in header.items()}, 8 + size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _place(name: str, entry: Any) -> Place:
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, first, last]
        fits = all(type(n) is int and 0 <= n < 1 << 48 for n in whole)
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits or not isinstance(dtype, str):
        raise BadTensors(f"the header entry of {name!r} lacks a dtype, shape or data_offsets")
    return dtype, tuple(shape), first, last


def _check_layout(
    places: Mapping[str, Place],
    announced: Mapping[str, tuple[str, tuple[int, ...]]],
    data_bytes: int,
    parts: Parts,
) -> None:
    for name, (dtype, shape) in announced.items():
        theirs, their_shape, first, last = places[name]
        if (theirs, their_shape) != (dtype, shape):
            known = theirs if theirs.isascii() and theirs.isalnum() else ascii(theirs)
            raise BadTensors(
                f"{_called(name, parts)} is {known} {their_shape}, this job and rank imply "
                f"{dtype} {shape}"
            )
        if last - first != math.prod(shape) * _SIZE[dtype]:
            raise BadTensors(f"{_called(name, parts)} has {last - first} bytes for shape {shape}")
    end = 0
    for _, _, first, last in sorted(places.values(), key=lambda place: place[2]):
        if first != end:
            raise BadTensors(f"tensors overlap or leave a gap at byte {end}")
        end = last
    if end != data_bytes:
        raise BadTensors(f"{data_bytes} bytes of tensors where the header accounts for {end}")


def _read(
    name: str, shape: tuple[int, ...], raw: Mapping[str, memoryview], encoding: Encoding
) -> np.ndarray:
    if encoding == "f32":
        return np.frombuffer(raw[name], "<f4").reshape(shape).copy()
    if encoding == "bf16":
        return _from_bf16(np.frombuffer(raw[name], "<u2")).reshape(shape)
    codes = np.frombuffer(raw[name], np.int8).reshape(shape)
    scales = np.frombuffer(raw[name + ROW_SCALE], "<f4").reshape(shape[:-1])
    with np.errstate(over="ignore", invalid="ignore"):  # `decode` refuses what comes of it
        restored: np.ndarray = codes.astype(np.float32) * scales[..., None]
    return restored


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16 (ties to even), as its upper 16 bits (uint16)."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Rounding would carry a NaN's mantissa over into infinity: keep it a (quiet) NaN instead.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2")


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes (…, m) int8 and the scale of each row (…) float32; a row of zeros has 0."""
    scales = (np.abs(values).max(axis=-1, initial=0.0) / 127).astype(np.float32)
    safe = np.where(scales > 0, scales, 1)
    return np.rint(values / safe[..., None]).clip(-127, 127).astype(np.int8), scales
