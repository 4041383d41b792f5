"""Messages and signatures: what a stranger may say, and that nothing else gets in."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from protocol.chunks import CHUNK_BYTES, MAX_CHUNKS, chunk_hash
from protocol.cohort import in_cohort
from protocol.errors import BadSignature, MalformedMessage, ProtocolError, UnsupportedVersion
from protocol.messages import (
    MODULES,
    BaseModelInfo,
    Control,
    FileInfo,
    GlobalManifest,
    Job,
    Round,
    Status,
    Training,
    UploadManifest,
    describe_file,
    upload_id,
)
from protocol.signing import MESSAGE_LIMIT_BYTES, SigningKey, open_message

TOPIC = "tunefleet/1/demo/round"
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = SigningKey(PRIVATE)
OTHER = SigningKey.generate()
ROUND = Round(job="demo", number=3, state="open", version=7, deadline=1.8e9, fraction=0.5)
FIELDS: dict[str, Any] = ROUND.model_dump()


def signed(body: Any, topic: str = TOPIC) -> bytes:
    """Sign any body at all, as a hostile device may."""
    signature = PRIVATE.sign(f"tunefleet/1\n{topic}\n{body}".encode())
    return json.dumps(
        {"body": body, "key": KEY.public, "signature": base64.b64encode(signature).decode()}
    ).encode()


def opened(fields: dict[str, Any] | str, model: type[BaseModel] = Round) -> BaseModel:
    body = fields if isinstance(fields, str) else json.dumps(fields)
    return open_message(signed(body), TOPIC, model)[0]


def base() -> BaseModelInfo:
    return BaseModelInfo(name="tiny", sha256="0" * 64, parameters=1000, modules={"m.q": (8, 8)})


def upload(**changes: Any) -> UploadManifest:
    return UploadManifest.model_validate(
        {
            "job": "demo",
            "device": "pi",
            "upload": upload_id("pi", "demo", 3),
            "round": 3,
            "version": 2,
            "rank": 2,
            "rank_trained": 4,
            "held": 8,
            "encoding": "bf16",
            "file": describe_file(b"abc").model_dump(),
            "examples": 100,
        }
        | changes
    )


MESSAGES: list[BaseModel] = [
    ROUND,
    Job(job="demo", base=base(), scale=2.0),
    GlobalManifest(
        job="demo", version=1, parent=0, encoding="bf16", bands={"0-2": describe_file(b"x")}
    ),
    Status(job="demo", device="pi", online=True, boot=4, state="training", rank=2, version=1),
    upload(metrics={"loss": 2.5}),
    Control(job="demo", device="pi", upload="0" * 32, kind="need", chunks=[0, 4]),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_what_is_sealed_opens_to_the_same(message: BaseModel) -> None:
    payload = KEY.seal(message, TOPIC)
    assert open_message(payload, TOPIC, type(message)) == (message, KEY.public)
    assert open_message(payload, TOPIC, type(message), trusted=KEY.public)[0] == message


def test_the_signature_is_that_of_the_documents() -> None:
    """Fixed bytes, so that another implementation can be held against this one."""
    envelope = json.loads(KEY.seal(ROUND, TOPIC))
    assert set(envelope) == {"body", "key", "signature"}
    assert signed(envelope["body"]) == KEY.seal(ROUND, TOPIC)
    assert KEY.public == "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="


def test_a_message_of_another_topic_is_refused() -> None:
    with pytest.raises(BadSignature, match="does not fit"):
        open_message(KEY.seal(ROUND, "tunefleet/1/other/round"), TOPIC, Round)


def test_a_message_of_another_key_is_refused() -> None:
    payload = OTHER.seal(ROUND, TOPIC)
    assert open_message(payload, TOPIC, Round)[1] == OTHER.public
    with pytest.raises(BadSignature, match="another key"):
        open_message(payload, TOPIC, Round, trusted=KEY.public)


def test_the_trusted_key_written_over_a_strangers_signature_is_refused() -> None:
    forged = json.loads(OTHER.seal(ROUND, TOPIC)) | {"key": KEY.public}
    with pytest.raises(BadSignature, match="does not fit"):
        open_message(json.dumps(forged).encode(), TOPIC, Round, trusted=KEY.public)


def test_a_tampered_body_is_refused() -> None:
    payload = KEY.seal(ROUND, TOPIC)
    tampered = payload.replace(b'\\"version\\":7', b'\\"version\\":8')
    assert tampered != payload
    with pytest.raises(BadSignature, match="does not fit"):
        open_message(tampered, TOPIC, Round)


@pytest.mark.parametrize(
    "change",
    [
        {"signature": ""},
        {"signature": "AAAA"},
        {"signature": "not base64!"},
        {"signature": "é"},
        {"signature": None},
        {"signature": 5},
        {"key": ""},
        {"key": "AAAA"},
        {"key": [1]},
        {"key": None},
        {"body": None},
        {"body": "half a character: \ud800"},
    ],
    ids=str,
)
def test_an_envelope_that_is_not_one_is_refused(change: dict[str, Any]) -> None:
    envelope = json.loads(KEY.seal(ROUND, TOPIC)) | change
    with pytest.raises(BadSignature):
        open_message(json.dumps(envelope).encode(), TOPIC, Round)


@pytest.mark.parametrize("name", ["body", "key", "signature"])
def test_an_envelope_without_a_part_is_refused(name: str) -> None:
    envelope = json.loads(KEY.seal(ROUND, TOPIC))
    del envelope[name]
    with pytest.raises(BadSignature, match="not signed"):
        open_message(json.dumps(envelope).encode(), TOPIC, Round)


@pytest.mark.parametrize("body", [5, None, True, [1, 2], {"job": "demo"}, 1.5])
def test_a_well_signed_body_that_is_not_text_is_refused(body: Any) -> None:
    with pytest.raises(BadSignature, match="not signed"):
        open_message(signed(body), TOPIC, Round)


@pytest.mark.parametrize(
    "payload", [b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe{", b"[" * 100_000]
)
def test_what_is_not_a_json_object_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedMessage, match="not"):
        open_message(payload, TOPIC, Round)
    if payload.isascii():
        with pytest.raises(MalformedMessage, match="not"):
            opened(payload.decode())


def test_a_message_beyond_the_limit_is_malformed() -> None:
    with pytest.raises(MalformedMessage, match="limit"):
        open_message(b" " * (MESSAGE_LIMIT_BYTES + 1), TOPIC, Round)


def test_the_largest_manifests_fit_the_limit() -> None:
    hashes = [chunk_hash(str(i).encode()) for i in range(MAX_CHUNKS)]
    file = FileInfo(bytes=MAX_CHUNKS * CHUNK_BYTES, sha256="0" * 64, chunks=hashes)
    message = upload(file=file.model_dump())
    payload = KEY.seal(message, TOPIC)
    assert len(payload) < MESSAGE_LIMIT_BYTES
    assert open_message(payload, TOPIC, UploadManifest)[0] == message


def test_modules_are_bounded_and_their_most_fit_the_limit() -> None:
    def job(count: int) -> Job:
        names = [
            f"model.layers.{n:03}.block_sparse_moe.experts.{n:04}.gate_proj" for n in range(count)
        ]
        modules = dict.fromkeys(names, (1 << 14, 1 << 14))
        described = base().model_dump() | {"modules": modules}
        return Job.model_validate({"job": "demo", "base": described, "scale": 1.0})

    assert len(KEY.seal(job(MODULES), TOPIC)) < MESSAGE_LIMIT_BYTES
    with pytest.raises(ValidationError, match="4097 entries are more than 4096"):
        job(MODULES + 1)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], 1.5])
def test_another_major_version_is_named(version: Any) -> None:
    with pytest.raises(UnsupportedVersion, match="same release"):
        opened(FIELDS | {"protocol": version, "state": "a state of version 2"})


def test_fields_of_later_minor_versions_are_ignored() -> None:
    assert opened(FIELDS | {"weather": "fair", "more": {"a": [1]}}) == ROUND


def test_a_key_that_stands_twice_is_malformed() -> None:
    with pytest.raises(MalformedMessage, match="twice"):
        opened(json.dumps(FIELDS)[:-1] + ', "version": 8}')
    whole = KEY.seal(ROUND, TOPIC)
    with pytest.raises(MalformedMessage, match="twice"):
        open_message(whole[:-1] + b', "key": "x"}', TOPIC, Round)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_not_finite_are_malformed(number: str) -> None:
    body = json.dumps(FIELDS).replace("1800000000.0", number)
    assert number in body
    with pytest.raises(MalformedMessage):
        opened(body)


@pytest.mark.parametrize(
    "change",
    [
        {"job": "Demo"},
        {"job": "a/b"},
        {"job": "#"},
        {"job": "demo\n"},
        {"job": ""},
        {"job": "-demo"},
        {"job": "a" * 64},
        {"job": None},
        {"number": -1},
        {"number": 1 << 48},
        {"number": 1.5},
        {"state": "running"},
        {"version": None},
        {"deadline": 0},
        {"deadline": -1.0},
        {"fraction": 1.01},
        {"fraction": -0.01},
    ],
    ids=str,
)
def test_a_round_out_of_bounds_is_malformed_and_names_the_field(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match=next(iter(change))):
        opened(FIELDS | change)


@pytest.mark.parametrize("name", ["job", "number", "state", "version"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(MalformedMessage, match=name):
        opened({k: v for k, v in FIELDS.items() if k != name})


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": 5},
        {"rank_trained": 9},
        {"held": 5000},
        {"examples": 0},
        {"examples": 1 << 40},
        {"upload": "0" * 31},
        {"upload": "G" * 32},
        {"encoding": "f64"},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"metrics": {str(i): 0.0 for i in range(33)}},
        {"metrics": {"x" * 501: 0.0}},
    ],
    ids=lambda c: str(c)[:40],
)
def test_an_upload_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        upload(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": CHUNK_BYTES + 1},
        {"bytes": -1},
        {"chunk_bytes": 0},
        {"chunk_bytes": 1},
        {"chunks": []},
        {"chunks": ["x"]},
        {"chunks": ["A" * 22] * 2},
        {"sha256": "0" * 63},
        {"sha256": "Z" * 64},
    ],
    ids=lambda c: str(c)[:40],
)
def test_a_file_that_does_not_add_up_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FileInfo.model_validate(describe_file(b"abc").model_dump() | change)


@pytest.mark.parametrize(
    "change",
    [
        {"ladder": []},
        {"ladder": [4, 2]},
        {"ladder": [2, 2]},
        {"ladder": [0, 2]},
        {"ladder": [2, 8192]},
        {"scale": 0},
        {"rounds": 0},
        {"remainder": "dropped", "directions": "rotating"},
        {"training": {"steps": 0}},
        {"pruning": {"gamma": 1.0}},
        {"base": base().model_dump() | {"modules": {}}},
        {"base": base().model_dump() | {"modules": {"m": [0, 4]}}},
    ],
    ids=str,
)
def test_a_job_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    good = Job(job="demo", base=base(), scale=1.0).model_dump()
    with pytest.raises(ValidationError):
        Job.model_validate(good | change)


def test_a_job_with_the_remainder_dropped_trains_the_top() -> None:
    job = Job(
        job="demo", base=base(), scale=1.0, remainder="dropped", directions="top", ladder=[2, 8]
    )
    assert job.rank == 8
    assert job.training == Training()


def test_upload_ids_are_the_same_after_a_crash_and_differ_otherwise() -> None:
    ids = {upload_id(d, j, n) for d in ("a", "b") for j in ("x", "y") for n in range(5)}
    assert len(ids) == 20
    assert upload_id("a", "x", 0) in ids


def test_the_cohort_is_the_fraction_and_changes_with_the_round() -> None:
    devices = [f"pi-{n}" for n in range(2000)]

    def cohort(number: int, fraction: float) -> set[str]:
        return {d for d in devices if in_cohort(d, "demo", number, fraction)}

    assert len(cohort(1, 1.0)) == 2000
    assert not cohort(1, 0.0)
    assert 500 < len(cohort(1, 0.3)) < 700
    assert cohort(1, 0.3) < cohort(1, 0.5)
    assert cohort(1, 0.3) != cohort(2, 0.3)


def test_a_key_is_made_once_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "key"
    first = SigningKey.load_or_create(path)
    assert SigningKey.load_or_create(path).public == first.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_mutated_bytes_are_refused_or_mean_the_same(edits: list[tuple[int, int]]) -> None:
    data = bytearray(KEY.seal(ROUND, TOPIC))
    for place, value in edits:
        data[place % len(data)] = value
    try:
        assert open_message(bytes(data), TOPIC, Round, trusted=KEY.public)[0] == ROUND
    except ProtocolError:
        return


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), JSON))
def test_any_well_signed_body_is_refused_or_read(change: dict[str, Any]) -> None:
    try:
        assert isinstance(opened(FIELDS | change), Round)
    except ProtocolError:
        return
