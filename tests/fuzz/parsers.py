"""Every parser of bytes from strangers, as one call each; the intake is in `intake.py`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import patch

import numpy as np
from pydantic import BaseModel

from aggregator.config import read_job
from aggregator.enrol import ca
from aggregator.enrol.create import create_fleet
from aggregator.enrol.folder import FleetFolder, FleetSettings
from aggregator.enrol.server import enrol
from protocol import topics
from protocol.bands import parse_band, read_adapter, stacks
from protocol.chunks import assemble, check_chunk, chunk_hash, file_hash, split
from protocol.enrolment import REQUEST_TOPIC, EnrolRequest, Token
from protocol.probe import decode_probe, encode_probe
from protocol.signing import SigningKey, open_message
from protocol.tensors import Encoding, decode
from protocol.transport import BrokerAddress
from tests.fuzz import corpus
from tests.fuzz.feeding import Parser
from tests.fuzz.intake import IntakeUnderFire
from tests.fuzz.mutate import mutated_header
from tests.fuzz.traces import trace_parsers


@contextmanager
def all_parsers(folder: Path) -> Iterator[list[Parser]]:
    """Make every parser, with the state that some need in a folder."""
    intake = IntakeUnderFire(folder / "intake")
    try:
        yield [
            *_signed(),
            *_tensors(),
            *_names(),
            *_enrolment(folder / "fleet"),
            *_job_files(folder),
            *trace_parsers(folder / "traces"),
            *intake.parsers(),
        ]
    finally:
        intake.store.close()


def text(data: bytes) -> str:
    """Return any bytes as text: what is no UTF-8 becomes lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


# -- what is signed ------------------------------------------------------------------------------


def _signed() -> list[Parser]:
    key, topic = SigningKey.generate(), corpus.TOPICS[0].decode()
    found = []
    for message in corpus.messages():
        model = type(message)

        def parse_body(data: bytes, model: type[BaseModel] = model) -> None:
            opened, _ = open_message(
                corpus.seal(key, data, topic), topic, model, trusted=key.public
            )
            again = model.model_validate_json(opened.model_dump_json())
            assert again == opened or model.__name__ == "Job"  # which has settings of any type

        def parse_envelope(data: bytes, model: type[BaseModel] = model) -> None:
            open_message(data, topic, model)

        name = model.__name__
        found.append(Parser(f"body of {name}", [message.model_dump_json().encode()], parse_body))
        found.append(Parser(f"envelope of {name}", [key.seal(message, topic)], parse_envelope))
    return found


# -- tensors and chunks --------------------------------------------------------------------------


def parse_probe(data: bytes) -> None:
    answer = decode_probe(data, corpus.PROBE)
    again = decode_probe(encode_probe(answer), corpus.PROBE)
    np.testing.assert_array_equal(again.values, answer.values)


def _tensors() -> list[Parser]:
    files = corpus.adapter_files()
    shapes = {s.name: s.shape for s in stacks(corpus.MODULES, corpus.RANKS)}
    found = []
    for encoding, data in files.items():

        def parse(data: bytes, encoding: Encoding = encoding) -> None:
            decode(data, shapes, encoding)

        def parse_adapter(data: bytes, encoding: Encoding = encoding) -> None:
            read_adapter(data, corpus.MODULES, corpus.RANKS, 2.0, encoding)

        samples = [data, *(files[e] for e in files if e != encoding)]
        found.append(Parser(f"tensors {encoding}", samples, parse, mutated_header))
        found.append(Parser(f"adapter {encoding}", samples, parse_adapter, mutated_header))
    found.append(Parser("probe answers", corpus.probe_files(), parse_probe, mutated_header))
    whole = files["f32"]
    chunks = split(whole, 64)
    hashes = [chunk_hash(chunk) for chunk in chunks]

    def check(data: bytes) -> None:
        """Take the first two bytes as the index, the others as a chunk."""
        index = int.from_bytes(data[:2], "big", signed=True)
        check_chunk(index, data[2:], hashes, 64, len(whole))
        assert data[2:] == chunks[index]
        parts = [*chunks[:index], data[2:], *chunks[index + 1 :]]
        assert assemble(parts, len(whole), file_hash(whole)) == whole

    def put_together(data: bytes) -> None:
        assert assemble(split(data, 64), len(whole), file_hash(whole)) == whole

    numbered = [i.to_bytes(2, "big") + chunk for i, chunk in enumerate(chunks)]
    return [*found, Parser("chunks", numbered, check), Parser("assembly", [whole], put_together)]


# -- names ---------------------------------------------------------------------------------------


def _names() -> list[Parser]:
    def parse_topic(data: bytes) -> None:
        found = topics.match(text(data))
        assert topics.topic(found.kind, **found.fields) == text(data)

    def parse_band_name(data: bytes) -> None:
        band = parse_band(text(data))
        assert parse_band(band.name) == band and text(data).isascii()

    def parse_address(data: bytes) -> None:
        address = BrokerAddress.parse(text(data))
        assert 0 < address.port < 65536
        assert BrokerAddress.parse(str(address)) == address

    return [
        Parser("topics", corpus.TOPICS, parse_topic),
        Parser("bands", corpus.BANDS, parse_band_name),
        Parser("broker addresses", corpus.ADDRESSES, parse_address),
    ]


# -- enrolment -----------------------------------------------------------------------------------


def _enrolment(path: Path) -> list[Parser]:
    now = datetime.now(timezone.utc)
    fleet = create_fleet(path, FleetSettings(hosts=["localhost"], port=8883, enrol_port=8884), now)
    token, key = fleet.issue_token("kitchen", hours=1.0, now=now), SigningKey.generate()
    requests = corpus.requests()
    bodies = [
        EnrolRequest(token=str(token), csr=as_pem(der)).model_dump_json().encode()
        for der in requests
    ]
    return [
        Parser("tokens", [str(token).encode()], lambda data: str(Token.parse(text(data)))),
        Parser("requests in DER", requests, lambda data: ca.read_request(as_pem(data))),
        Parser(
            "requests in PEM",
            [as_pem(der).encode() for der in requests],
            lambda data: ca.read_request(text(data)),
        ),
        Parser("enrolment bodies", bodies, lambda data: _enrol(fleet, key, data, now)),
        Parser(
            "enrolment envelopes",
            [corpus.seal(key, body, REQUEST_TOPIC) for body in bodies[:2]],
            lambda data: enrol(fleet, data, now),
        ),
    ]


def _enrol(fleet: FleetFolder, key: SigningKey, body: bytes, now: datetime) -> None:
    device, _ = enrol(fleet, corpus.seal(key, body, REQUEST_TOPIC), now)
    assert device == "kitchen"


def as_pem(der: bytes) -> str:
    lines = base64.encodebytes(der).decode()
    kind = "CERTIFICATE REQUEST"
    return f"-----BEGIN {kind}-----\n{lines}-----END {kind}-----\n"


# -- job files -----------------------------------------------------------------------------------


def _job_files(folder: Path) -> list[Parser]:
    def parse(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        with patch("aggregator.edge.importlib.util.find_spec", return_value=None):
            job, policy = read_job(path)
        type(job).model_validate_json(job.model_dump_json())
        assert 0 < policy.fraction <= 1

    folder.mkdir(parents=True, exist_ok=True)
    toml, as_json = folder / "job.toml", folder / "job.json"
    return [
        Parser("job files (TOML)", corpus.JOB_TOML, lambda data: parse(toml, data)),
        Parser("job files (JSON)", corpus.job_json(), lambda data: parse(as_json, data)),
    ]
