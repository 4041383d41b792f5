"""No bytes make a parser raise anything but an error that one can read, nor cost memory for long.

The short form: `python -m tests.fuzz --inputs 100000` is the long one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.feeding import Fault, Parser, traced
from tests.fuzz.parsers import all_parsers

INPUTS = 25
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5)
    ),
    max_leaves=10,
)
hostile = (
    st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
    | json_values.map(lambda value: json.dumps(value).encode())
)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Parser]]:
    with all_parsers(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


def test_mutations_are_refused_or_taken(parsers: list[Parser]) -> None:
    with traced():
        for parser in parsers:
            parser.run(INPUTS)
    assert all(parser.refused for parser in parsers)
    # Some refuse all their samples, for those are of other encodings, keys or topics.
    assert sum(parser.accepted > 0 for parser in parsers) >= len(parsers) - 2


@given(st.data())
@settings(max_examples=300)
def test_any_bytes_are_refused_or_taken(parsers: list[Parser], data: st.DataObject) -> None:
    parser = parsers[data.draw(st.integers(0, len(parsers) - 1))]
    sample, junk = data.draw(st.sampled_from([b"", *parser.samples])), data.draw(hostile)
    at = data.draw(st.integers(0, len(sample)))
    parser.feed(sample[:at] + junk + sample[at + data.draw(st.integers(0, 50)) :])


def test_faults_are_seen() -> None:
    def broken(data: bytes) -> None:
        if data == b"large":
            bytearray(50 << 20)
        raise KeyError

    with traced(), pytest.raises(Fault, match="KeyError"):
        Parser("broken", [b""], broken).run(0)
    with traced(), pytest.raises(Fault, match="bytes of memory"):
        Parser("greedy", [b""], lambda data: bytearray(50 << 20) and None).run(0)
