"""What devices and the aggregator say to each other, as checked types.

Hostile bytes become one of these once, at the door (`protocol.signing.open_message`). Unknown
fields are ignored, so that a minor version may add some; every number is bounded and finite.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from protocol.artifact import ALL_FILES
from protocol.chunks import CHUNK_BYTES, MAX_CHUNKS, chunk_count, chunk_hash, file_hash, split
from protocol.factors import Factoring
from protocol.tensors import Encoding
from protocol.topics import NAME

Name = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
Text = Annotated[str, StringConstraints(max_length=500)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
UploadId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
ArtifactId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
ChunkHash = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{22}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 48)]
Rank = Annotated[int, Field(ge=1, le=4096)]
Dimension = Annotated[int, Field(ge=1, le=1 << 20)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Bitmap = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,1024}$")]
ENTRIES = 32
MODULES = 4096
ARTIFACT_CHUNKS = 8192
"""1 GiB; the manifest, which has a hash of each, is of 230 KB then."""
PersonalRule = Literal["trust-weights", "trust-validation", "trust-predictions"]
"""Rules whose devices get adapters of their own."""
CANDIDATES = 64
LARGEST_LOSS = 1e6
"""Nats a token: far over that of any text, and small enough to be reckoned with."""
DEVICES = 2048
"""With the longest names as many, with a version each and a trial, fit in a message."""


def _at_most(entries: int) -> BeforeValidator:
    """Refuse too many entries before each is looked at: every bad one costs kilobytes."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"{len(value)} entries are more than {entries}")
        return value

    return BeforeValidator(check)


FEW = _at_most(ENTRIES)


class Message(BaseModel):
    """Base of all messages: frozen, tolerant of fields of later minor versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class BaseModelInfo(Message):
    """Name the frozen model that everybody adapts, and the modules that carry an adapter."""

    name: Text
    sha256: Sha256
    parameters: Count
    modules: Annotated[
        dict[Text, tuple[Dimension, Dimension]],
        Field(min_length=1, max_length=MODULES),
        _at_most(MODULES),
    ]
    """Target module → (d_out, d_in)."""


class Training(Message, strict=True):
    """Settings of local training, the same for every device."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 12
    tokens_per_step: Annotated[int, Field(ge=16, le=1 << 24)] = 1024
    max_tokens: Annotated[int, Field(ge=16, le=1 << 17)] = 256
    learning_rate: Positive = 4e-3
    learning_rate_by_rank: bool = True
    """Multiply the rate by √(R/r): with one fixed scale a small rank moves the model less."""
    learning_rate_last: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The rate of the last round as a part of that of the first: in between it falls evenly."""
    learning_rate_a: Positive = 1.0
    """The rate of A as a multiple of that of B."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip_norm: Positive = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    optimizer: Literal["fit", "adamw", "adafactor"] = "fit"
    """Adafactor keeps no state; "fit": it, where AdamW would cost a device rank."""
    factors: Factoring = "both"
    """Train A and B in every round, or in turn; see `protocol.factors`."""


class Pruning(Message, strict=True):
    """Settings of HetLoRA self-pruning (arXiv 2401.06432)."""

    enabled: bool = True
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of the rank that is the head; at 0.99 a cut takes one direction."""
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.005
    rank_min: Rank = 2


class Limits(Message, strict=True):
    """What the aggregator refuses beyond."""

    upload_bytes: Annotated[Count, Field(ge=1)] = CHUNK_BYTES * MAX_CHUNKS
    update_norm: Positive = 1e4
    """Largest Frobenius norm of an upload's change of the scaled product, over all modules."""
    factor_norm: Positive = 1e4
    """Largest norm of its factors A' or s·B', whole: one of zeros hides the other."""


class Probe(Message, strict=True):
    """A public text that all devices predict, so that their adapters can be compared."""

    text: Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
    positions: Annotated[int, Field(ge=1, le=1024)] = 256
    """How many of its next tokens are predicted; fewer where the text is shorter."""
    top_k: Annotated[int, Field(ge=1, le=1024)] = 100
    """Largest logits that a device sends of each position."""


class Job(Message, strict=True):
    """A fine-tuning job: what every device must know first. Strict: "6" is no number, nor true."""

    protocol: Literal[1] = 1
    job: Name
    base: BaseModelInfo
    scale: Positive
    ladder: Annotated[list[Rank], Field(min_length=1, max_length=32, strict=False)] = [
        2,
        4,
        8,
        16,
        32,
        64,
    ]
    rule: Text = "anchored"
    rule_settings: dict[Text, Any] = {}
    remainder: Literal["frozen", "dropped"] = "frozen"
    directions: Literal["top", "rotating"] = "rotating"
    layers: Literal["all", "fit"] = "all"
    """Whether a device may train some modules alone, where its memory does not hold all."""
    training: Training = Training()
    pruning: Pruning = Pruning()
    limits: Limits = Limits()
    encoding_up: Encoding = "bf16"
    encoding_down: Encoding = "bf16"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 6
    seed: Count = 0
    probe: Probe | None = None
    """With it every upload brings the device's top logits, as rule `trust-predictions` needs."""

    @model_validator(mode="after")
    def _check(self) -> Job:
        if sorted(set(self.ladder)) != self.ladder:
            raise ValueError("ladder must be ascending ranks without repetition, say [2, 4, 8]")
        if self.directions == "rotating" and self.remainder == "dropped":
            raise ValueError(
                "directions = 'rotating' needs remainder = 'frozen': a device that dropped the "
                "other directions has nothing to rotate over"
            )
        if self.layers == "fit" and self.remainder == "dropped":
            raise ValueError(
                "layers = 'fit' needs remainder = 'frozen': a device that dropped what it does not "
                "train would train its modules without all the others"
            )
        return self

    @property
    def is_personal(self) -> bool:
        """Whether devices get adapters of their own, and say how those do that they try."""
        return self.rule in get_args(PersonalRule)

    @property
    def rank(self) -> int:
        """Rank of the shared adapter: the top of the ladder."""
        return self.ladder[-1]


def job_tables() -> dict[str, list[str]]:
    """Return the names of the settings in each of a job's tables: training, pruning and so on."""
    return {
        name: [*field.annotation.model_fields]
        for name, field in Job.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


class Round(Message):
    """Where the job stands: what devices train now, from which version, until when."""

    protocol: Literal[1] = 1
    job: Name
    number: Count
    state: Literal["waiting", "open", "finished"]
    version: Count
    """The global version that this round starts from (the last one, when finished)."""
    deadline: Positive | None = None
    """Seconds since 1970, UTC."""
    fraction: Share = 1.0
    """Share of the fleet that takes part; see `in_cohort`."""
    attempt: Count = 0
    """Grows when the round is extended for want of updates: who was refused trains once more."""
    behind: Count = 0
    """Versions by which an update may be behind and still count, as one that is trained on now: not
    0 in a buffered round alone."""


class FileInfo(Message):
    """Describe a file that travels in chunks."""

    bytes: Count
    sha256: Sha256
    chunk_bytes: Annotated[int, Field(ge=1, le=1 << 24)] = CHUNK_BYTES
    chunks: Annotated[list[ChunkHash], Field(min_length=1, max_length=MAX_CHUNKS)]

    @model_validator(mode="after")
    def _check(self) -> FileInfo:
        if len(self.chunks) != chunk_count(self.bytes, self.chunk_bytes):
            raise ValueError(f"{self.bytes} bytes are not {len(self.chunks)} chunks")
        return self


def describe_file(data: bytes) -> FileInfo:
    """Return the description of a file for its manifest."""
    return FileInfo(
        bytes=len(data), sha256=file_hash(data), chunks=[chunk_hash(c) for c in split(data)]
    )


class ArtifactFile(FileInfo):
    """Describe a file of an artifact set: the weights may have more chunks than others may."""

    bytes: Annotated[Count, Field(ge=1)]
    """An empty chunk would be an empty retained message, which is none."""
    chunks: Annotated[list[ChunkHash], Field(min_length=1, max_length=ARTIFACT_CHUNKS)]


class ArtifactManifest(Message):
    """An artifact set that devices may fetch, to train with ONNX Runtime (protocol.artifact)."""

    protocol: Literal[1] = 1
    job: Name
    artifact: ArtifactId
    """`protocol.artifact.artifact_id` of its manifest.json."""
    base_sha256: Sha256
    """The hash of the base that it is of, as the job has it."""
    files: Annotated[dict[Text, ArtifactFile], Field(max_length=ENTRIES), FEW]
    """All of protocol.artifact.ALL_FILES, in that order."""

    @model_validator(mode="after")
    def _check(self) -> ArtifactManifest:
        if list(self.files) != list(ALL_FILES):
            raise ValueError(f"its files are not {', '.join(ALL_FILES)}")
        if any(file.chunk_bytes != CHUNK_BYTES for file in self.files.values()):
            raise ValueError(f"its chunks are not of {CHUNK_BYTES} bytes")
        if sum(len(file.chunks) for file in self.files.values()) > ARTIFACT_CHUNKS:
            raise ValueError(f"it has more than {ARTIFACT_CHUNKS} chunks")
        return self

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


class GlobalManifest(Message):
    """A version of the shared adapter: one file for each rank band."""

    protocol: Literal[1] = 1
    job: Name
    version: Count
    parent: Count | None
    encoding: Encoding
    bands: Annotated[dict[Text, FileInfo], Field(min_length=1, max_length=ENTRIES), FEW]
    personal: Annotated[dict[Name, Count], Field(max_length=DEVICES), _at_most(DEVICES)] = {}
    """Devices that have an adapter of their own, and the version it is of; only in the common
    manifest, as what follows. The others go on with the common one."""
    trials: Annotated[list[Name], Field(max_length=DEVICES)] = []
    """Devices that are given a second adapter to try, of this version."""
    candidates: Annotated[Count, Field(le=CANDIDATES)] = 0
    """Adapters of this version that are offered to all to try, numbered from 0."""


class Status(Message):
    """How a device is; retained, and its last will says `online: false`."""

    protocol: Literal[1] = 1
    job: Name
    device: Name
    online: bool
    boot: Count
    """Grows with every start of the agent, so that an old will can't undo a new start."""
    state: Literal[
        "planning", "idle", "waiting", "downloading", "training", "uploading", "unfit", "stopped"
    ] = "idle"
    profile: Text = ""
    rank: Count = 0
    version: Count | None = None
    detail: Text = ""


class TrustLosses(Message):
    """Losses of adapters on a device's trust split, before it trained: 0 … 10⁶ nats a token.

    All are of the same text, and of the adapters of the version the round starts from.
    """

    received: Finite
    """The adapter that it starts from."""
    own: Finite | None = None
    """What it had after training in the round before, if it took part in that."""
    trial: Finite | None = None
    candidates: Annotated[
        dict[Annotated[int, Field(ge=0, lt=CANDIDATES)], Finite],
        Field(max_length=CANDIDATES),
        _at_most(CANDIDATES),
    ] = {}
    """By their numbers; those that it had the link and the memory for."""


class UploadManifest(Message):
    """An update that a device offers: a delta against the version it started from."""

    protocol: Literal[1] = 1
    job: Name
    device: Name
    upload: UploadId
    round: Count
    attempt: Count = 0
    """The round's attempt that the device trained in."""
    version: Count
    """The global version that the round starts from."""
    personal: Count | None = None
    """The version of its own adapter that the device started from; null: from the common one."""
    rank: Rank
    """The rank it ended with; the tensors have it."""
    rank_trained: Rank
    """The rank it started with: `protocol.adapter.directions` draws that many."""
    held: Rank
    """How many directions of the version the device had: its draw was among them."""
    modules: Bitmap | None = None
    """The modules that it trained, as `protocol.layers` writes them; None: all."""
    encoding: Encoding
    file: FileInfo
    probe_bytes: Count = 0
    """How many of the file's last bytes are the answer to the job's probe (`protocol.probe`)."""
    examples: Annotated[int, Field(ge=1, lt=1 << 40)]
    """Tokens it trained on; the sample share of a merge rule."""
    metrics: Annotated[dict[Text, Finite], Field(max_length=ENTRIES), FEW] = {}
    trust: TrustLosses | None = None

    @model_validator(mode="after")
    def _check(self) -> UploadManifest:
        if not self.rank <= self.rank_trained <= self.held:
            raise ValueError("rank ≤ rank_trained ≤ held does not hold")
        if self.probe_bytes > self.file.bytes:
            raise ValueError(f"probe_bytes {self.probe_bytes} are more than the file's")
        return self


class Control(Message):
    """What the aggregator tells one device about one of its uploads."""

    protocol: Literal[1] = 1
    job: Name
    device: Name
    upload: UploadId
    kind: Literal["need", "done", "reject", "wait"]
    chunks: Annotated[list[Count], Field(max_length=MAX_CHUNKS)] = []
    """`need`: the chunks that are missing."""
    reason: Text = ""
    """`reject` and `wait`: why, in words for the device's owner."""


def upload_id(device: str, job: str, round_number: int, attempt: int = 0) -> str:
    """Return the id of a device's update for a round's attempt: the same after any crash."""
    again = f"|{attempt}" if attempt else ""
    return hashlib.sha256(f"{device}|{job}|{round_number}{again}".encode()).hexdigest()[:32]
