"""Artifact sets of noise: in form whole, made in no time, and nothing to train with."""

from __future__ import annotations

import random
from pathlib import Path

from protocol.artifact import FILES, GRAPH, MANIFEST, TOKENIZER, WEIGHTS, Artifact, sha256_of
from protocol.chunks import CHUNK_BYTES
from protocol.messages import Job


def write_set(folder: Path, job: Job, *, chunks: int = 40, seed: int = 0) -> Path:
    """Write a set of a job's base whose weights have so many chunks, the last of them short."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed)
    (folder / WEIGHTS).write_bytes(noise.randbytes((chunks - 1) * CHUNK_BYTES + 100))
    (folder / GRAPH).write_bytes(noise.randbytes(CHUNK_BYTES))
    (folder / TOKENIZER).write_bytes(b"{}")
    artifact = Artifact(
        name=job.base.name,
        base_sha256=job.base.sha256,
        modules=dict(job.base.modules),
        head="head",
        bos_token_id=None,
        eos_token_id=0,
        chat_template=None,
        special_tokens={},
        opset=17,
        versions={},
        files={name: sha256_of(folder / name) for name in FILES},
    )
    (folder / MANIFEST).write_text(artifact.model_dump_json())
    return folder
