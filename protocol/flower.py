"""What travels between our Flower strategy and our Flower client: one blob each way.

A request has the shared adapter's bytes and the job, a reply the update's bytes and its manifest,
as over MQTT. All tensors of either are one safetensors file in one array of bytes. The manifest is
not signed: Flower authenticates its nodes.
"""

from __future__ import annotations

import json
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from protocol.adapter import Adapter, module_rank
from protocol.bands import read_adapter, to_tensors
from protocol.errors import MalformedMessage
from protocol.messages import Job, Message, UploadManifest
from protocol.mistakes import first_mistake
from protocol.tensors import encode

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Names of the records in a message, as Flower's own strategies have them."""
BLOB, JOB, MANIFEST, ROUND = "safetensors", "job", "manifest", "server-round"
M = TypeVar("M", bound=Message)


def to_arrays(data: bytes) -> ArrayRecord:
    """Return a file as a record of one array."""
    return ArrayRecord({BLOB: Array(np.frombuffer(data, np.uint8))})


def blob_of(arrays: ArrayRecord) -> bytes:
    """Return the file in a record.

    Raises:
        MalformedMessage: it has something else.
    """
    if [*arrays] != [BLOB]:
        raise MalformedMessage(ARRAYS, f"its arrays are not {BLOB!r} alone")
    array = arrays[BLOB]
    if array.dtype != "uint8" or len(array.shape) != 1:
        raise MalformedMessage(ARRAYS, "its array is not one of bytes")
    return bytes(array.numpy().tobytes())


def adapter_to_arrays(job: Job, adapter: Adapter) -> ArrayRecord:
    """Return the shared adapter as it travels, in the job's encoding."""
    return to_arrays(encode(to_tensors(adapter), job.encoding_down))


def adapter_of(job: Job, arrays: ArrayRecord) -> Adapter:
    """Return the shared adapter that `adapter_to_arrays` made a record of.

    Raises:
        ProtocolError: the record is of something else.
    """
    shapes = job.base.modules
    ranks = {name: module_rank(shape, job.rank) for name, shape in shapes.items()}
    return read_adapter(blob_of(arrays), shapes, ranks, job.scale, job.encoding_down)


def request(job: Job, arrays: ArrayRecord, config: ConfigRecord, number: int) -> RecordDict:
    """Return what a node is sent in a round; what the caller has in `config` comes along."""
    more = {JOB: job.model_dump_json(), ROUND: number}
    return RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, **more})})


def job_of(content: RecordDict) -> tuple[Job, int]:
    """Return the job and the round of a request.

    Raises:
        MalformedMessage: it has none.
    """
    number = content.config_records[CONFIG].get(ROUND) if CONFIG in content.config_records else None
    if not isinstance(number, int) or number < 1:
        raise MalformedMessage(CONFIG, f"{ROUND} is no round's number")
    return _message(content, JOB, Job), number


def reply(manifest: UploadManifest, data: bytes) -> RecordDict:
    """Return what a node answers: its update and the manifest about it."""
    told = ConfigRecord({MANIFEST: manifest.model_dump_json()})
    return RecordDict({ARRAYS: to_arrays(data), CONFIG: told})


def manifest_of(content: RecordDict) -> UploadManifest:
    """Return the manifest of a reply.

    Raises:
        MalformedMessage: it has none.
    """
    return _message(content, MANIFEST, UploadManifest)


def _message(content: RecordDict, name: str, kind: type[M]) -> M:
    text = content.config_records[CONFIG].get(name) if CONFIG in content.config_records else None
    if not isinstance(text, str):
        raise MalformedMessage(CONFIG, f"it has no {name}")
    try:
        return kind.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        why = first_mistake(error) if isinstance(error, ValidationError) else str(error)
        raise MalformedMessage(CONFIG, f"{name}: {why}") from None
