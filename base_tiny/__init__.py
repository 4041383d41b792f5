"""Ship base-tiny, a 2.8 M parameter Llama base model, and the code that makes it.

Importing this package loads neither torch nor transformers: it only names the folder.
"""

from pathlib import Path

__all__ = ["PATH"]

PATH: Path = Path(__file__).resolve().parent / "model"
"""Folder with config.json, model.safetensors and the tokenizer files."""
