"""Every parser of bytes from strangers, as one call each, and the run that feeds it.

A parser may take what it is given or refuse it with an error that a person can read as one line
(`TunefleetError`); what it took must also be fit to be written down and read again. Any other
exception is a fault, and so is memory out of proportion to the input.
"""

from __future__ import annotations

import base64
import io
import random
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import patch

from pydantic import BaseModel

from aggregator.config import read_job
from aggregator.enrol import ca
from aggregator.enrol.folder import FleetFolder, FleetSettings, create_fleet
from aggregator.enrol.server import enrol
from aggregator.intake import Intake
from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.versions import Versions, first_version
from protocol import topics
from protocol.bands import parse_band, read_adapter, stacks
from protocol.chunks import assemble, check_chunk, chunk_hash, file_hash, split
from protocol.enrolment import REQUEST_TOPIC, EnrolRequest, Token
from protocol.errors import TunefleetError
from protocol.events import EventLog
from protocol.messages import Control, Status, UploadManifest
from protocol.signing import SigningKey, open_message
from protocol.tensors import Encoding, decode
from protocol.transport import BrokerAddress
from tests.fuzz import corpus
from tests.fuzz.mutate import mutated, mutated_header

MEMORY_BASE, MEMORY_EACH = 2 << 20, 64
"""Bytes that a parser may need for itself, and for each byte of its input."""
OPEN = RoundState(corpus.ROUND, "open", 1, None)
Make = Callable[[random.Random, Sequence[bytes]], bytes]


class Fault(AssertionError):
    """Say which parser failed on which bytes."""


@dataclass
class Parser:
    """Hold what parses, samples of what it takes, and what has come of it."""

    name: str
    samples: Sequence[bytes]
    parse: Callable[[bytes], None]
    """Raises TunefleetError for what it refuses."""
    make: Make = mutated
    accepted: int = 0
    refused: int = 0
    worst: int = 0
    """Most bytes of memory for one input."""

    def feed(self, data: bytes) -> None:
        """Parse one input.

        Raises:
            Fault: an error of the wrong type, or too much memory.
        """
        traced = tracemalloc.is_tracing()
        if traced:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
        try:
            self.parse(data)
        except TunefleetError:
            self.refused += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(where.filename).name}:{where.lineno}"
            raise Fault(f"{self.name}: {error!r} ({at}) for {_shown(data)}") from error
        else:
            self.accepted += 1
        if traced:
            used = tracemalloc.get_traced_memory()[1] - before
            self.worst = max(self.worst, used)
            if used > MEMORY_BASE + MEMORY_EACH * len(data):
                raise Fault(f"{self.name}: {used} bytes of memory for {_shown(data)}")

    def run(self, inputs: int, seed: int = 0) -> None:
        """Feed the samples, then that many mutations of them."""
        rng = random.Random(seed ^ zlib.crc32(self.name.encode()))
        for sample in self.samples:
            self.feed(sample)
        for _ in range(inputs):
            self.feed(self.make(rng, self.samples))


@contextmanager
def traced() -> Iterator[None]:
    """Count the memory of what is fed."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


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
            *intake.parsers(),
        ]
    finally:
        intake.store.close()


def _shown(data: bytes) -> str:
    return f"{len(data)} bytes {data[:300]!r}"


def text(data: bytes) -> str:
    """Return any bytes as text: what is no UTF-8 becomes lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


def seal(key: SigningKey, body: bytes, topic: str) -> bytes:
    """Sign any text as a body, as only a device of the fleet can."""

    class Raw(BaseModel):
        def model_dump_json(self, **_: object) -> str:
            return body.decode("utf-8", "replace")

    return key.seal(Raw(), topic)


# -- what is signed ------------------------------------------------------------------------------


def _signed() -> list[Parser]:
    key, topic = SigningKey.generate(), corpus.TOPICS[0].decode()
    found = []
    for message in corpus.messages():
        model = type(message)

        def parse_body(data: bytes, model: type[BaseModel] = model) -> None:
            opened, _ = open_message(seal(key, data, topic), topic, model, trusted=key.public)
            again = model.model_validate_json(opened.model_dump_json())
            assert again == opened or model.__name__ == "Job"  # which has settings of any type

        def parse_envelope(data: bytes, model: type[BaseModel] = model) -> None:
            open_message(data, topic, model)

        name = model.__name__
        found.append(Parser(f"body of {name}", [message.model_dump_json().encode()], parse_body))
        found.append(Parser(f"envelope of {name}", [key.seal(message, topic)], parse_envelope))
    return found


# -- tensors and chunks --------------------------------------------------------------------------


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
            [seal(key, body, REQUEST_TOPIC) for body in bodies[:2]],
            lambda data: enrol(fleet, data, now),
        ),
    ]


def _enrol(fleet: FleetFolder, key: SigningKey, body: bytes, now: datetime) -> None:
    device, _ = enrol(fleet, seal(key, body, REQUEST_TOPIC), now)
    assert device == "kitchen"


def as_pem(der: bytes) -> str:
    lines = base64.encodebytes(der).decode()
    kind = "CERTIFICATE REQUEST"
    return f"-----BEGIN {kind}-----\n{lines}-----END {kind}-----\n"


# -- job files -----------------------------------------------------------------------------------


def _job_files(folder: Path) -> list[Parser]:
    def parse(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        with patch("aggregator.config.importlib.util.find_spec", return_value=None):
            job, policy = read_job(path)
        type(job).model_validate_json(job.model_dump_json())
        assert 0 < policy.fraction <= 1

    folder.mkdir(parents=True, exist_ok=True)
    toml, as_json = folder / "job.toml", folder / "job.json"
    return [
        Parser("job files (TOML)", corpus.JOB_TOML, lambda data: parse(toml, data)),
        Parser("job files (JSON)", corpus.job_json(), lambda data: parse(as_json, data)),
    ]


# -- the intake as a whole -----------------------------------------------------------------------


class Refused(TunefleetError):
    """Stand for an input that the intake dropped or answered with a refusal."""


class IntakeUnderFire:
    """An intake with an open round, which goes on whatever it is sent."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.store._db.run("PRAGMA synchronous = OFF")  # nobody pulls the plug here
        self.store.bind_job(corpus.JOB.model_dump_json())
        versions = Versions(corpus.JOB, self.store)
        self.store.add_version(versions.write(first_version(corpus.JOB), version=1, parent=None))
        self.store.set_round(OPEN)
        self.device, self.key = SigningKey.generate(), SigningKey.generate()
        self.events, self.time = io.StringIO(), 1e9
        log = EventLog(as_json=False, stream=self.events)
        self.intake = Intake(
            corpus.JOB, self.store, versions, self.key, log, clock=lambda: self.time
        )
        self.data = corpus.adapter_files()["int8"]
        self.status_topic, self.manifest_topic, self.chunk_topic = (
            corpus.TOPICS[n].decode() for n in (4, 5, 6)
        )
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all but the device's key, and let quarantine and quotas run out."""
        self.time += 10_000
        for table in ("devices", "conduct", "uploads", "arrived"):
            self.store._db.run(f"DELETE FROM {table}")
        self.events.seek(0)
        self.events.truncate()
        status = Status(job="notes", device=corpus.DEVICE, online=True, boot=1)
        self.intake.handle(self.status_topic, self.device.seal(status, self.status_topic))
        assert self.store.devices.key(corpus.DEVICE) == self.device.public

    def send(self, topic: str, payload: bytes) -> list[Control]:
        """Let the intake handle a message, and return its answers once it is well afterwards."""
        answers = self.intake.handle(topic, payload)
        assert self.store.round() == OPEN
        assert self.store.devices.ready() <= {corpus.DEVICE, "x", "phone"}
        self.store.uploads_of(corpus.ROUND, "receiving", "counted", "rejected")
        assert all(line.isprintable() for line in self.events.getvalue().splitlines())
        return [open_message(p, t, Control, trusted=self.key.public)[0] for t, p in answers]

    def parsers(self) -> list[Parser]:
        key = self.device
        samples = [
            key.seal(message, topic)
            for message in corpus.messages()
            for topic in (self.status_topic, self.manifest_topic)
        ]
        topic_lines = [topic + b"\n" + data for topic in corpus.TOPICS for data in samples[6:10]]
        return [
            Parser("intake: any topic", [*topic_lines, corpus.TOPICS[6] + b"\n"], self.anything),
            Parser("intake: statuses", _bodies(Status), self.status),
            Parser("intake: manifests", _bodies(UploadManifest), self.manifest),
            Parser("intake: chunks", [self.data], self.chunk),
            Parser("intake: updates", [self.data], self.update, mutated_header),
        ]

    def anything(self, data: bytes) -> None:
        """Take the first line as the topic; the broker passes on UTF-8 alone."""
        self.begin_anew()
        topic, _, payload = data.partition(b"\n")
        self.send(topic.decode("utf-8", "replace"), payload)
        if self.events.getvalue():
            raise Refused

    def status(self, body: bytes) -> None:
        self.begin_anew()
        self.send(self.status_topic, seal(self.device, body, self.status_topic))
        if " refused " in self.events.getvalue():
            raise Refused

    def manifest(self, body: bytes) -> None:
        """Offer a manifest, then a chunk that may or may not be the one it names."""
        self.begin_anew()
        answers = self.send(self.manifest_topic, seal(self.device, body, self.manifest_topic))
        self.send(self.chunk_topic, self.data)
        if [a.kind for a in answers] != ["need"]:
            raise Refused

    def chunk(self, data: bytes) -> None:
        self.begin_anew()
        sealed = self.device.seal(corpus.manifest(self.data), self.manifest_topic)
        assert [a.kind for a in self.send(self.manifest_topic, sealed)] == ["need"]
        if [a.kind for a in self.send(self.chunk_topic, data)] != ["done"]:
            raise Refused

    def update(self, data: bytes) -> None:
        """Offer any file, honestly described, so that its bytes are read."""
        self.begin_anew()
        sealed = self.device.seal(corpus.manifest(data), self.manifest_topic)
        answers = self.send(self.manifest_topic, sealed)
        if [a.kind for a in answers] == ["need"]:
            chunks = split(data)
            for index in answers[0].chunks:
                answers = self.send(self.chunk_topic[:-1] + str(index), chunks[index])
        assert [a.kind for a in answers] in (["done"], ["reject"])
        if answers[0].kind == "reject":
            raise Refused


def _bodies(model: type[BaseModel]) -> list[bytes]:
    return [m.model_dump_json().encode() for m in corpus.messages() if isinstance(m, model)]
