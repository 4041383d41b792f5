"""What differs between the backends before training begins: the trainer, tokenizer and warm-up.

Both are given a folder: of the base model for torch, of the artifact set (edge_client/ort) for
onnx. Nothing of the other backend is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_client.plan import Backend
from edge_client.trainer.base import Trainer

LIBRARIES: dict[Backend, Sequence[str]] = {
    "torch": ("torch", "transformers"),
    "onnx": ("onnxruntime-training-cpu", "numpy"),
}
"""Packages on whose version it depends what a backend takes."""


def open_trainer(backend: Backend, folder: Path, *, dtype: str, threads: int) -> Trainer:
    """Load the base model for training.

    Raises:
        ModelError: it can't be loaded.
    """
    if backend == "onnx":
        from edge_client.trainer.onnx_trainer import OnnxTrainer

        return OnnxTrainer(folder, threads=threads)
    from edge_client.trainer.torch_trainer import TorchTrainer

    return TorchTrainer(folder, dtype=dtype, threads=threads)


def open_tokenizer(backend: Backend, folder: Path) -> Any:
    """Load the tokenizer; its ids are the same with both backends.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    if backend == "onnx":
        from edge_client.data.plain_tokenizer import load_plain_tokenizer

        return load_plain_tokenizer(folder)
    from edge_client.model import load_tokenizer

    return load_tokenizer(folder)


def warm_up(backend: Backend, dtype: str, threads: int) -> None:
    """Load the code of a backend, and start its threads where they are not the model's."""
    if backend == "onnx":
        from edge_client.ort.runtime import import_onnxruntime

        import_onnxruntime()
    else:
        from edge_client.trainer.warm_up import warm_up as warm_up_torch

        warm_up_torch(dtype, threads)
