"""A pool of updates that real trainings made, for devices of a replay that train nothing.

    pool.json            what it is of, the base's loss, the constants of the memory model
    rank-8.safetensors   the change of each factor that a training at that rank made

One training for each rank of the job's ladder, from the job's first version, on the replay's text.
A pool is kept by the hash of all that it follows from, so it is made once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from device_profiles.errors import ReplayError
from device_profiles.virtual.benches import Unhurried
from device_profiles.virtual.text import text_files
from edge_client.calibrate import ProbingProcess, calibrate
from edge_client.errors import EdgeError
from edge_client.learner import Learner
from edge_client.learning import Learned, Place
from edge_client.memory import Activations, Way, optimizer_of
from edge_client.plan import Calibration, Plan
from edge_client.trainer.worker import Text, TextReport
from protocol.adapter import Adapter, initial_adapter, module_rank
from protocol.bands import read_adapter, to_tensors
from protocol.errors import ProtocolError, os_words
from protocol.files import write_durably
from protocol.messages import Job
from protocol.tensors import encode

FILE, FORMAT = "pool.json", 1
SPREAD = 0.5
"""A device's update is a recorded one times 1 ± up to this, drawn for device and round."""
SEED = 0
"""Of a pool's text and first version: a replay's own seed makes no other pool."""
Says = Callable[[str], object]


class UpdateRecord(BaseModel):
    """What is known of one recorded training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: int
    tokens: int
    loss: float
    rows: int
    sha256: str


class WayRecord(BaseModel):
    """The constants of one way of training; see `edge_client.memory.Activations`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dtype: str
    checkpointing: bool
    fixed_mib: float
    token_mib: float
    least_mib: float = 0.0
    probed_tokens: int = 0
    kept_mib: float = 0.0
    probed: tuple[tuple[int, float], ...] = ()
    tokens_s: float


class CalibrationRecord(BaseModel):
    """The constants of the memory model, as they were measured where the pool was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    floor_mib: float
    weights_mib: dict[str, float]
    counted_mib: dict[str, float] = {}
    ways: list[WayRecord]

    @classmethod
    def of(cls, measured: Calibration) -> CalibrationRecord:
        ways = [
            WayRecord(
                dtype=way.dtype,
                checkpointing=way.checkpointing,
                tokens_s=measured.tokens_s[way],
                **asdict(found),
            )
            for way, found in measured.activations.items()
        ]
        return cls(
            floor_mib=measured.floor_mib,
            weights_mib=dict(measured.weights_mib),
            counted_mib=dict(measured.counted_mib),
            ways=ways,
        )

    def calibration(self) -> Calibration:
        ways = {Way(each.dtype, each.checkpointing): each for each in self.ways}
        kept = {"dtype", "checkpointing", "tokens_s"}
        return Calibration(
            floor_mib=self.floor_mib,
            weights_mib=self.weights_mib,
            counted_mib=self.counted_mib,
            activations={w: Activations(**r.model_dump(exclude=kept)) for w, r in ways.items()},
            tokens_s={way: each.tokens_s for way, each in ways.items()},
        )


class PoolRecord(BaseModel):
    """The contents of pool.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    base_sha256: str
    base_loss: float
    train_tokens: int
    held_out_tokens: int
    constants: CalibrationRecord
    updates: list[UpdateRecord]


@dataclass(frozen=True, slots=True)
class RecordedUpdate:
    """One recorded training: by how much it moved each factor, and what it said of itself."""

    change: Adapter
    tokens: int
    loss: float
    rows: int


class Pool:
    """Read a pool from its folder, for a job.

    Raises:
        ReplayError: it is not there, damaged, or of another base or ladder.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self._job = folder, job
        self._updates: dict[int, RecordedUpdate] = {}
        try:
            text = (folder / FILE).read_bytes()
            self.record = record = PoolRecord.model_validate_json(text)
            for each in record.updates:
                data = (folder / f"rank-{each.rank}.safetensors").read_bytes()
                if hashlib.sha256(data).hexdigest() != each.sha256:
                    raise ReplayError(f"{folder}: the update of rank {each.rank} is damaged")
                ranks = {n: module_rank(s, each.rank) for n, s in job.base.modules.items()}
                change = read_adapter(data, job.base.modules, ranks, job.scale, "f32")
                self._updates[each.rank] = RecordedUpdate(change, each.tokens, each.loss, each.rows)
        except OSError as error:
            raise ReplayError(f"can't read the pool {folder}: {os_words(error)}") from None
        except (ValidationError, ProtocolError) as error:
            raise ReplayError(f"the pool {folder} is damaged, or of another job: {error}") from None
        if record.format != FORMAT or record.base_sha256 != job.base.sha256:
            raise ReplayError(f"the pool {folder} is of another base or version: make it anew")
        if missing := sorted({*job.ladder} - {*self._updates}):
            raise ReplayError(f"the pool {folder} lacks rank {missing[0]} of the job's ladder")
        self.sha256 = hashlib.sha256(text).hexdigest()
        self.base_loss = record.base_loss
        self.text = TextReport(record.train_tokens, record.held_out_tokens, ())

    @property
    def calibration(self) -> Calibration:
        """The constants of the memory model, as they were measured when the pool was made."""
        return self.record.constants.calibration()

    def update(self, rank: int, device: str, round_number: int) -> RecordedUpdate:
        """Return the recorded update of the smallest rank that has as many directions.

        It is scaled by a number drawn from device and round, so that no two updates are equal.
        """
        known = self._updates[min(r for r in self._updates if r >= rank)]
        digest = hashlib.sha256(f"{self._job.seed}|{device}|{round_number}|pool".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        factor = 1 + SPREAD * (2 * share - 1)
        layers = {
            name: type(f)((factor * f.a).astype(f.a.dtype), (factor * f.b).astype(f.b.dtype))
            for name, f in known.change.layers.items()
        }
        change = Adapter(layers, known.change.scale)
        return RecordedUpdate(change, known.tokens, known.loss, known.rows)


def pool_key(job: Job, data: Sequence[Path]) -> str:
    """Return the hash of all that a pool follows from."""
    told: dict[str, Any] = {
        "format": FORMAT,
        "base": job.base.sha256,
        "training": job.training.model_dump(mode="json"),
        "ladder": job.ladder,
        "scale": job.scale,
        "text": text_hashes(data),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def text_hashes(data: Sequence[Path]) -> list[str]:
    """Return the hash of each file of text, those of folders included, in order.

    Raises:
        ReplayError: one is not there, or can't be read.
    """
    try:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in text_files(data)]
    except OSError as error:
        raise ReplayError(f"can't read the text of --data: {os_words(error)}") from None


def find_pool(job: Job, model: Path, data: Sequence[Path], cache: Path, say: Says) -> Pool:
    """Return the pool of a job and a text, made now or remembered in `cache`.

    Raises:
        ReplayError: it can't be made or kept.
    """
    folder = cache / "pools" / pool_key(job, data)
    if not (folder / FILE).exists():
        say(f"training once at each of the ranks {job.ladder}, to have updates to replay")
        try:
            make_pool(job, model, data, folder, cache)
        except EdgeError as error:
            raise ReplayError(f"no pool of updates could be made: {error}") from None
        except OSError as error:
            raise ReplayError(f"can't keep a pool in {folder}: {os_words(error)}") from None
    return Pool(folder, job)


def make_pool(job: Job, model: Path, data: Sequence[Path], folder: Path, cache: Path) -> None:
    """Measure the memory model's constants, train once at each rank, and keep what came of it.

    Raises:
        EdgeError: training failed.
        OSError: the folder can't be written.
    """
    constants = _measure(job, model, cache)
    first = initial_adapter(job.base.modules, job.rank, job.scale, SEED)
    learned: dict[int, Learned] = {}
    base_loss, text = math.nan, TextReport(0, 0, ())
    for rank in job.ladder:
        with _learner(job, model, data, rank) as learner:
            if math.isnan(base_loss):
                base_loss, text = learner.evaluate(None), learner.text
            learned[rank] = _train(learner, first.truncated(rank), rank)
    folder.mkdir(parents=True, exist_ok=True)
    updates = [_keep(folder, rank, one, first) for rank, one in learned.items()]
    record = PoolRecord(
        format=FORMAT,
        base_sha256=job.base.sha256,
        base_loss=base_loss,
        train_tokens=text.train_tokens,
        held_out_tokens=text.held_out_tokens,
        constants=CalibrationRecord.of(constants),
        updates=updates,
    )
    write_durably(folder / FILE, record.model_dump_json(indent=1).encode())


@contextmanager
def _learner(job: Job, model: Path, data: Sequence[Path], rank: int) -> Iterator[Learner]:
    """Yield what trains at a rank, in a process of its own."""
    learner = Learner(
        job,
        "pool",
        {"torch": model},
        Text(tuple(data), SEED),
        plain_plan(job, rank),
        _no_step_down,
        Unhurried(),
    )
    try:
        yield learner
    finally:
        learner.stop()


def _train(learner: Learner, start: Adapter, rank: int) -> Learned:
    place = Place(round_number=1, attempt=0, drawn_rows=0)
    return learner.train(start, rank, place, on_step=lambda step, loss: None)


def _keep(folder: Path, rank: int, learned: Learned, first: Adapter) -> UpdateRecord:
    data = encode(to_tensors(_full(learned.change, first.truncated(rank))), "f32")
    write_durably(folder / f"rank-{rank}.safetensors", data)
    report = learned.report
    return UpdateRecord(
        rank=rank,
        tokens=report.tokens,
        loss=report.loss,
        rows=report.drawn_rows,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def plain_plan(job: Job, rank: int) -> Plan:
    """Return the plan that a pool is trained by: one thread, so that it comes out alike."""
    rows = max(1, job.training.tokens_per_step // job.training.max_tokens)
    return Plan(
        rank,
        rank,
        min(rows, 4),
        job.training.max_tokens,
        False,
        "f32",
        1,
        1.0,
        1e9,
        optimizer=optimizer_of(job.training),
    )


def _measure(job: Job, model: Path, cache: Path) -> Calibration:
    with ProbingProcess(math.inf) as process:
        return calibrate(
            model,
            job.base,
            dtypes=("f32", "mixed", "bf16"),
            threads=1,
            seq_len=job.training.max_tokens,
            scale=job.scale,
            cache=cache,
            process=process,
        )


def _full(change: Adapter, like: Adapter) -> Adapter:
    """Give a change that was cut, by pruning, its rank back: the rest has not moved."""
    import numpy as np

    layers = {}
    for name, f in change.layers.items():
        whole = like.layers[name]
        a, b = np.zeros_like(whole.a), np.zeros_like(whole.b)
        a[: f.rank], b[:, : f.rank] = f.a, f.b
        layers[name] = type(f)(a, b)
    return Adapter(layers, change.scale)


def _no_step_down(before: Plan, why: str) -> Plan:
    raise EdgeError(f"training at rank {before.rank} was killed: {why}")
