"""A merged model as an ONNX graph with a KV cache, by optimum's exporter."""

from __future__ import annotations

from pathlib import Path

from edge_client.errors import ModelError
from edge_client.model import quiet
from protocol.errors import os_words

TASK = "text-generation-with-past"


def write_graph(model: Path, folder: Path, *, tie: bool) -> None:
    """Write `model.onnx`, configuration and tokenizer of a model of transformers into a folder.

    `tie` has an output head that is the embedding point to it; else it is a constant of its own.
    Whether the graph computes what the model does is for tests: optimum's own check takes longer
    than the export.

    Raises:
        ModelError: optimum can't export this kind of model.
    """
    with quiet("optimum"):
        from optimum.exporters.onnx import main_export
    with quiet("optimum"):  # again: it sets how much it says when it is first imported
        try:
            main_export(
                str(model),
                folder,
                task=TASK,
                do_validation=False,
                no_post_process=not tie,
                local_files_only=True,
            )
        except (ValueError, KeyError, RuntimeError, NotImplementedError, TypeError) as error:
            raise ModelError(
                f"optimum can't export this model to ONNX ({os_words(error)[:300]}); export it "
                "with --format merged and chat with --backend torch"
            ) from None
