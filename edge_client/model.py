"""The frozen base model: found by name, described without loading it, loaded for training.

Every module here that is linear and repeats from layer to layer is a target of the adapter,
whatever its family calls it. torch and transformers are imported where they are needed only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.errors import ModelError
from protocol.errors import os_words
from protocol.messages import BaseModelInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

BASE_TINY = "base-tiny"
PARTIAL = "model.downloading"
"""In the state folder while a model is on its way: the hub's cache may hold a part of it."""
WEIGHT_SUFFIXES = (".safetensors", ".bin")
_HUB_WORDS = {
    "ImportError": "huggingface_hub is not installed",
    "HFValidationError": "a hub can't have a model of this name",
    "GatedRepoError": "it is only for who has been let in there",
    "RepositoryNotFoundError": "the hub has no model of this name, or not for everybody",
    "LocalEntryNotFoundError": "the hub can't be reached, and the model was not downloaded before",
    "HfHubHTTPError": "the hub refused it",
    "HTTPError": "the hub can't be reached",
    "ConnectionError": "the hub can't be reached",
}
"""Kind of error of huggingface_hub and what it is built on → what it means; special ones first."""


def is_of_hub(name: str) -> bool:
    """Say whether a model's name can be the id that a hub has it by, and is no folder here."""
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return is_id and not Path(name).is_dir()


def find_model(name: str, *, downloads: bool = True) -> Path:
    """Return the folder of a model: the built-in `base-tiny`, a folder, or a hub id.

    Without `downloads` no hub is asked: a hub's model is what was downloaded of it before, which
    may be a part.

    Raises:
        ModelError: there is no such folder, and no hub gave the model; says why.
    """
    if name == BASE_TINY:
        import base_tiny

        return base_tiny.PATH
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: it is not a model folder")
        return folder
    if not is_of_hub(name):
        raise ModelError(_not_found(name, "a hub id has the form owner/name"))
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(name, allow_patterns=patterns, local_files_only=not downloads)
        return Path(found)
    except Exception as error:  # a hub fails in many ways, and its words fill a screen
        raise ModelError(_not_found(name, _hub_words(error))) from None


def is_partial(name: str, state: Path) -> bool:
    """Say whether a device's download of a model was begun and has not come to its end."""
    try:
        return (state / PARTIAL).read_text() == name
    except OSError:
        return False


def model_name(name: str) -> str:
    """Return what a fleet calls a model that `find_model` finds by `name`.

    A folder goes by its own name; the built-in one and a hub's by theirs, for that finds them on
    every device (a hub's model lies in a folder that is called by a hash).
    """
    folder = Path(name).expanduser().absolute()
    return folder.name if name != BASE_TINY and folder.is_dir() else name


def _not_found(name: str, why: str) -> str:
    return (
        f"the model {name!r} is neither a folder on this computer nor to be had from a hub "
        f"({why}); check the name, or get the model elsewhere and give its folder (on a device: "
        f"--model FOLDER); {BASE_TINY!r} is built in"
    )


def _hub_words(error: Exception) -> str:
    """Return why a hub did not give a model, by the error or one that it is of the kind of."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return next((words for name, words in _HUB_WORDS.items() if name in kinds), kinds[0])


def describe_model(name: str) -> BaseModelInfo:
    """Return what a job says of a model: its hash, size and target modules.

    Only the configuration is read into a model (on torch's meta device); weights are hashed.

    Raises:
        ModelError: the folder holds no causal language model that transformers loads.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = find_model(name)
    config = _config(folder)
    _check_weights(folder)
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"can't build the model in {folder}: {_first_line(error)}") from None
    return BaseModelInfo(
        name=model_name(name),
        sha256=model_hash(folder),
        parameters=sum(p.numel() for p in model.parameters()),
        modules=find_targets(model),
    )


def model_hash(folder: Path) -> str:
    """Return the SHA-256 over a model's weights and tokenizer: what must be equal in a fleet.

    Raises:
        ModelError: the folder has no weights.
    """
    weights = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
    weights = weights or sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if not weights:
        raise ModelError(f"{folder} has no weights (*.safetensors)")
    total = hashlib.sha256()
    for path in [*weights, folder / "tokenizer.json"]:
        if path.is_file():
            with path.open("rb") as file:
                total.update(
                    hashlib.file_digest(file, "sha256").digest()
                    if _HAS_DIGEST
                    else hashlib.sha256(file.read()).digest()
                )
    return total.hexdigest()


_HAS_DIGEST = hasattr(hashlib, "file_digest")  # Python 3.11


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the model's repeated blocks, its longest ModuleList, and what it is called.

    Raises:
        ModelError: there are none.
    """
    from torch import nn

    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError("the model has no repeated blocks to adapt")
    return max(lists, key=lambda pair: len(pair[1]))


def find_targets(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the modules that carry an adapter, with the (d_out, d_in) of their weight.

    They are the linear modules inside the model's repeated blocks. That leaves out embeddings and
    the output head. GPT-2's Conv1D stores its weight as (d_in, d_out).

    Raises:
        ModelError: there are none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    prefix = find_blocks(model)[0]
    targets: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name.startswith(f"{prefix}."):
            if isinstance(module, nn.Linear):
                targets[name] = (module.out_features, module.in_features)
            elif isinstance(module, Conv1D):
                targets[name] = (module.weight.shape[1], module.weight.shape[0])
    if not targets:
        raise ModelError(f"the model's blocks ({prefix}) have no linear modules to adapt")
    return targets


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a causal language model, frozen and without dropout, in `dtype`.

    Raises:
        ModelError: transformers can't load it.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = _config(folder)
    _check_weights(folder)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation="sdpa"
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"can't load the model in {folder}: {_first_line(error)}") from None
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def load_tokenizer(folder: Path) -> Any:
    """Load a model's tokenizer.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"can't load the tokenizer in {folder}: {_first_line(error)}") from None


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"can't read {folder / 'config.json'}: {_first_line(error)}") from None
    _check_causal(folder, config)
    config.use_cache = False
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def _check_causal(folder: Path, config: Any) -> None:
    """Refuse encoders, which transformers would load as if they predicted the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder
    if masked or config.is_encoder_decoder:
        raise ModelError(
            f"the model in {folder} ({config.model_type}) does not predict the next token of a "
            "text; give a causal language model"
        )


def _check_weights(folder: Path) -> None:
    """Refuse files that a broken download or a full disk has left."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is not a whole safetensors file ({_first_line(error)}); copy or download "
                "it again"
            ) from None


def _first_line(error: Exception) -> str:
    return os_words(error)[:300]


@contextlib.contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Keep transformers, and `more` libraries, from printing: what matters comes as an error."""
    loggers = [logging.getLogger(name) for name in ("transformers", *more)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
