"""Turn valid bytes into hostile ones: the same seed gives the same bytes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    b"0", b"-1", b"-0", b"1.5", b"true", b"255", b"65536", b"2147483648", b"281474976710656",
    b"9223372036854775808", b"1e308", b"1e999", b"-1e999", b"NaN", b"Infinity", b"1" + b"0" * 5000,
)  # fmt: skip
TOKENS = (
    b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\u0000"', b'"\\u001b[2J\\n"', b"\x00",
    b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"../", b"/", b"#", b"+", b"-", b"%00", b"[", b"]",
    b"\xd9\xa3", b"1979-05-27T07:32:00Z", b'"""', b"inf", b"nan", b"-----BEGIN X-----",
)  # fmt: skip
LENGTHS = (0, 1, 7, 8, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31)
DEPTHS = (10, 200, 400, 600, 900, 5000)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 1e308, float("inf"), float("nan"), 1 << 47, 1 << 48, 1 << 63,
    1 << 64, 10**4000, "", "x" * 600, "\ud800", "\x00", "\x1b[2J\n", "٣", "notes", "phone-1",
    "../x", [], {}, [[]], [1, 2, 3], [0] * 5000, {"x": 1}, {"\ud800": "\ud800"}, "A" * 44,
)  # fmt: skip

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def mutated(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """Return one of the samples, changed in one to four ways."""
    data = rng.choice(samples)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(MUTATIONS)(rng, data, samples)
    return data


def mutated_header(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """Return a safetensors file: now and then its header alone changes, and its length fits it."""
    if rng.random() < 0.5:
        return mutated(rng, samples)
    data = rng.choice(samples)
    size = int.from_bytes(data[:8], "little")
    change = rng.choice((json_value, json_value, number, double_key, nest, token))
    header = change(rng, data[8 : 8 + size], samples)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def flip(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\x00")
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    first, last = _slice(rng, data)
    return rng.choice((data[:first], data[first:], data[:first] + data[last:]))


def double(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    first, last = _slice(rng, data)
    times = rng.choice((2, 2, 2, 3, 50))
    return data[:first] + data[first : first + min(last - first, 2000)] * times + data[last:]


def splice(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    other = rng.choice(samples)
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def length(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    """Write a number over 1, 2, 4 or 8 bytes, as often as not at the beginning."""
    width = rng.choice((1, 2, 4, 8))
    at = 0 if rng.random() < 0.5 else rng.randint(0, len(data))
    value = (rng.choice((*LENGTHS, len(data), 1 << 63)) + rng.randint(-1, 1)) % (1 << 8 * width)
    order = "little" if rng.random() < 0.5 else "big"
    return data[:at] + value.to_bytes(width, order) + data[at + width :]


def number(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    """Put another number in the place of one."""
    found = list(re.finditer(rb"\d+", data[:20_000]))
    if not found:
        return data + rng.choice(NUMBERS)
    at = rng.choice(found)
    return data[: at.start()] + rng.choice(NUMBERS) + data[at.end() :]


def token(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.choice(TOKENS) + data[at:]


def double_key(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    """Say a key of a JSON object or a TOML table twice."""
    found = list(re.finditer(rb'"\w+": ?(?:"[^"]*"|[\w.]+),?|\n\w+ = [^\n]+', data[:20_000]))
    if not found:
        return data + data
    at = rng.choice(found)
    again = at.group() if at.group().endswith(b",") or b" = " in at.group() else at.group() + b","
    return data[: at.start()] + again + data[at.start() :]


def nest(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    """Put something deep in the place of a value."""
    depth = rng.choice(DEPTHS)
    left, right = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    deep = left * depth + b"1" + right * (depth if rng.random() < 0.9 else 0)
    found = list(re.finditer(rb'(?<=: )"[^"]*"|(?<=:)"[^"]*"|(?<=:)[\d.]+', data[:20_000]))
    if not found:
        return deep
    at = rng.choice(found)
    return data[: at.start()] + deep + data[at.end() :]


def json_value(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    """Change one value of a JSON text, or give it more fields; other bytes get a flip."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        return flip(rng, data, samples)
    places = list(_places(whole))
    if not places:
        return json.dumps(rng.choice(ODD)).encode()
    holder, key = rng.choice(places)
    what = rng.random()
    if what < 0.6:
        holder[key] = rng.choice(ODD)
    elif what < 0.8:
        del holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice(("x", "\ud800", "\x1b", "protocol", "x" * 600))] = rng.choice(ODD)
    else:
        holder.extend(holder * rng.choice((1, 40)))
    try:
        return json.dumps(whole).encode()
    except (ValueError, RecursionError):
        return data


MUTATIONS: tuple[Mutation, ...] = (
    flip, flip, cut, double, splice, length, number, token, double_key, nest,
    json_value, json_value, json_value, json_value,
)  # fmt: skip


def _slice(rng: random.Random, data: bytes) -> tuple[int, int]:
    first, last = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    return first, last


def _places(value: Any) -> Any:
    if not isinstance(value, (dict, list)):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        yield from _places(value[key])
