"""Chunks and topics: cutting and putting together, writing and reading."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.chunks import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    assemble,
    check_chunk,
    chunk_count,
    chunk_hash,
    file_hash,
    split,
)
from protocol.errors import BadChunk, MalformedMessage, UnsupportedVersion
from protocol.messages import describe_file
from protocol.topics import TABLE, match, subscription, topic

FIELDS = {
    "job": "demo",
    "device": "pi-4",
    "version": "12",
    "band": "4-8",
    "index": "3",
    "number": "7",
    "upload": "0123456789abcdef" * 2,
    "artifact": "fedcba9876543210" * 2,
    "file": "weights.safetensors",
}


@given(st.binary(max_size=200), st.integers(1, 50))
def test_a_file_survives_its_chunks(data: bytes, size: int) -> None:
    pieces = split(data, size)
    hashes = [chunk_hash(p) for p in pieces]
    assert len(pieces) == chunk_count(len(data), size)
    for index, piece in enumerate(pieces):
        check_chunk(index, piece, hashes, size, len(data))
    assert assemble(pieces, len(data), file_hash(data)) == data


def test_an_empty_file_is_one_empty_chunk() -> None:
    assert split(b"") == [b""]
    assert chunk_count(0) == 1
    check_chunk(0, b"", [chunk_hash(b"")], CHUNK_BYTES, 0)
    assert describe_file(b"").bytes == 0


def test_hashes_are_as_documented() -> None:
    assert chunk_hash(b"") == "47DEQpj8HBSa-_TImW-5JA"
    assert file_hash(b"x") == hashlib.sha256(b"x").hexdigest()


def test_a_file_of_too_many_chunks_is_refused() -> None:
    assert len(split(bytes(MAX_CHUNKS), 1)) == MAX_CHUNKS
    with pytest.raises(BadChunk, match="limit"):
        split(bytes(MAX_CHUNKS + 1), 1)


@pytest.mark.parametrize(
    ("index", "chunk"),
    [
        (-1, b"ab"),
        (3, b"e"),
        (0, b"ba"),
        (0, b"a"),
        (0, b"abc"),
        (0, b""),
        (1, b"ab"),
        (2, b"ef"),
        (2, b""),
    ],
)
def test_a_chunk_that_its_manifest_does_not_know_is_refused(index: int, chunk: bytes) -> None:
    hashes = [chunk_hash(p) for p in (b"ab", b"cd", b"e")]
    with pytest.raises(BadChunk):
        check_chunk(index, chunk, hashes, 2, 5)


@pytest.mark.parametrize("pieces", [[b"ab"], [b"ab", b"c", b"d"], [b"c", b"ab"], [b"ab", b"d"], []])
def test_a_whole_of_the_wrong_pieces_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(BadChunk, match="assembled"):
        assemble(pieces, 3, file_hash(b"abc"))


@pytest.mark.parametrize("kind", TABLE)
def test_a_topic_reads_back_as_it_was_written(kind: str) -> None:
    found = match(topic(kind, **FIELDS))
    assert found.kind == kind
    assert found.fields == {k: v for k, v in FIELDS.items() if k in found.fields}
    assert topic(kind, **found.fields) == topic(kind, **FIELDS)


@pytest.mark.parametrize("kind", TABLE)
def test_a_subscription_takes_its_topics(kind: str) -> None:
    from paho.mqtt.client import topic_matches_sub

    written = topic(kind, **FIELDS)
    assert topic_matches_sub(subscription(kind), written)
    assert topic_matches_sub(subscription(kind, **FIELDS), written)
    assert topic_matches_sub(subscription(kind, job="demo"), written)
    assert not topic_matches_sub(subscription(kind, job="other"), written)


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("job", ["", "Demo", "a/b", "+", "#", "-a", "a-", "a" * 64, "a\n", "ä"])
def test_a_name_that_would_leave_its_level_is_refused(kind: str, job: str) -> None:
    with pytest.raises(ValueError, match="topic"):
        topic(kind, **(FIELDS | {"job": job}))


def test_a_topic_needs_its_fields() -> None:
    with pytest.raises(KeyError):
        topic("status", job="demo")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "other/1/demo/job",
        "tunefleet/1/demo",
        "tunefleet/1/demo/job/",
        "tunefleet/1/demo/job\n",
        "tunefleet/1/Demo/job",
        "tunefleet/1//job",
        "tunefleet/1/demo/d/pi/up/xyz/manifest",
        "tunefleet/1/demo/global/-1/manifest",
        "tunefleet/1/demo/global/1/4-8/99999",
        "tunefleet/1/demo/global/1/4/0",
        "tunefleet/1/demo/global/٣/manifest",
    ],
)
def test_what_is_no_topic_is_malformed(name: str) -> None:
    with pytest.raises(MalformedMessage, match="no such topic"):
        match(name)


@pytest.mark.parametrize("name", ["tunefleet/2/demo/job", "tunefleet/x/demo/job", "tunefleet"])
def test_a_topic_of_another_version_is_named(name: str) -> None:
    with pytest.raises(UnsupportedVersion):
        match(name)
