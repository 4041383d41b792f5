"""Valid samples of everything that is parsed, made by the code itself."""

from __future__ import annotations

import json

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID
from pydantic import BaseModel

from protocol.adapter import initial_adapter
from protocol.bands import band_ranks, bands, cut, to_tensors
from protocol.messages import (
    BaseModelInfo,
    Control,
    GlobalManifest,
    Job,
    Probe,
    Round,
    Status,
    UploadManifest,
    describe_file,
    upload_id,
)
from protocol.probe import TopLogits, encode_probe
from protocol.signing import SigningKey
from protocol.tensors import Encoding, encode

DEVICE, ROUND = "phone-1", 1
MODULES = {"model.layers.0.q": (6, 5), "model.layers.0.k": (3, 5)}
ENCODINGS: tuple[Encoding, ...] = ("f32", "bf16", "int8")
BASE = BaseModelInfo(name="toy", sha256="0" * 64, parameters=1000, modules=MODULES)
JOB = Job(job="notes", base=BASE, scale=2.0, ladder=[2, 4], encoding_up="int8")
UPLOAD = upload_id(DEVICE, JOB.job, ROUND)


def adapter_files() -> dict[Encoding, bytes]:
    """Return band 0-2 of a small adapter in each encoding."""
    adapter = cut(initial_adapter(MODULES, 4, 2.0, 0), bands(JOB.ladder)[0])
    return {e: encode(to_tensors(adapter), e) for e in ENCODINGS}


PROBE = Probe(text="What all may read.", positions=3, top_k=4)


def probe_files() -> list[bytes]:
    """Return answers to the probe: a whole one, and one of a shorter text."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4)).astype(np.float16)
    whole = TopLogits(np.argsort(rng.random((3, 9)))[:, :4], values)
    return [encode_probe(whole), encode_probe(TopLogits(whole.indices[:2], values[:2]))]


RANKS = band_ranks(MODULES, bands(JOB.ladder)[0])


def manifest(data: bytes) -> UploadManifest:
    return UploadManifest(
        job=JOB.job,
        device=DEVICE,
        upload=UPLOAD,
        round=ROUND,
        version=1,
        rank=2,
        rank_trained=2,
        held=2,
        encoding=JOB.encoding_up,
        file=describe_file(data),
        examples=10,
        metrics={"loss": 1.5},
    )


def messages() -> list[BaseModel]:
    data = adapter_files()["int8"]
    return [
        JOB,
        Round(job="notes", number=1, state="open", version=1, deadline=1e9, fraction=0.5),
        GlobalManifest(
            job="notes", version=1, parent=0, encoding="bf16",
            bands={"0-2": describe_file(data), "2-4": describe_file(bytes(300_000))},
        ),
        Status(job="notes", device=DEVICE, online=True, boot=1, profile="pi", rank=2, version=1),
        manifest(data),
        Control(job="notes", device=DEVICE, upload=UPLOAD, kind="need", chunks=[0, 1]),
    ]  # fmt: skip


TOPICS = [
    b"tunefleet/1/notes/job",
    b"tunefleet/1/notes/round",
    b"tunefleet/1/notes/global/12/manifest",
    b"tunefleet/1/notes/global/12/4-8/17",
    b"tunefleet/1/notes/d/phone-1/status",
    f"tunefleet/1/notes/d/phone-1/up/{UPLOAD}/manifest".encode(),
    f"tunefleet/1/notes/d/phone-1/up/{UPLOAD}/0".encode(),
    b"tunefleet/1/notes/d/phone-1/ctl",
]
BANDS = [b"0-2", b"4-8", b"64-128", b"00002-00004", "٣-٤".encode(), "²-³".encode()]
ADDRESSES = [
    b"mqtt://broker.local:1883",
    b"mqtts://[fe80::1%25eth0]:8883?version=5",
    b"192.168.1.2",
    b"mqtt://me:secret@host/?version=3.1.1",
    "mqtt://bröker。local:１".encode(),
]
JOB_TOML = [
    b"""job = "notes"
model = "toy.json"
rule = "anchored"
scale = 2.0
ladder = [2, 4, 8]
rounds = 20
seed = 7

[rule_settings]
split = "left"

[training]
steps = 50
learning_rate = 2e-3

[policy]
min_devices = 3
quorum = 2
deadline_s = 3600
fraction = 0.5
quarantine_after = 5
quarantine_s = 60.0
""",
    b"""job = "notes"
scale = 2.0
base = {name = "toy", sha256 = "%s", parameters = 9, modules = {"q" = [6, 5]}}
limits.update_norm = 1e4
pruning.enabled = true
encoding_up = 'bf16'
"""
    % (b"0" * 64),
]


def job_json() -> list[bytes]:
    fields = JOB.model_dump(mode="json", exclude={"protocol"})
    policy = {"min_devices": 3, "quarantine_after": 5, "quarantine_s": 60.0, "fraction": 0.5}
    return [
        json.dumps({**fields, "policy": policy}).encode(),
        json.dumps({"job": "notes", "model": "toy.json", "rule_settings": {"split": "b"}}).encode(),
    ]


def requests() -> list[bytes]:
    """Return certificate requests in DER, of keys that are taken and of others."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kitchen")])
    names = x509.SubjectAlternativeName([x509.DNSName("kitchen.local")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    made = [builder.add_extension(names, critical=False)]
    curves = (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1())
    found = [b.sign(ec.generate_private_key(c), hashes.SHA256()) for b in made for c in curves]
    found += [builder.sign(ed25519.Ed25519PrivateKey.generate(), None)]
    found += [builder.sign(ed448.Ed448PrivateKey.generate(), None)]
    found += [builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA512())]
    found += [builder.sign(dsa.generate_private_key(1024), hashes.SHA256())]
    return [request.public_bytes(serialization.Encoding.DER) for request in found]


def seal(key: SigningKey, body: bytes, topic: str) -> bytes:
    """Sign any text as a body, as only a device of the fleet can."""

    class Raw(BaseModel):
        def model_dump_json(self, **_: object) -> str:
            return body.decode("utf-8", "replace")

    return key.seal(Raw(), topic)
