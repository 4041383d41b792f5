"""A tokenizer on the tokenizers library alone: the same ids as transformers', without loading it.

What transformers adds to tokenizer.json (end tokens, chat template) comes with the artifact set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.errors import ModelError
from edge_client.ort.artifact import read_artifact
from protocol.artifact import TOKENIZER, Artifact

if TYPE_CHECKING:
    from jinja2 import Template

    from edge_client.exports.manifest import Export

_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Around what a template marks as the assistant's: characters that no text may hold (Unicode)."""


@dataclass(frozen=True)
class PlainTokenizer:
    """Implement `edge_client.data.tokenize.Tokenizer`."""

    encoder: Any
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """Names as templates use them (bos_token, …) → the token's text."""
    is_fast: bool = True

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
        """Encode a text, or several at once, with no special tokens around."""
        if isinstance(text, str):
            return {"input_ids": self.encoder.encode(text, add_special_tokens=False).ids}
        many = self.encoder.encode_batch_fast(text, add_special_tokens=False)
        return {"input_ids": [one.ids for one in many]}

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self.encoder.decode(ids, skip_special_tokens=True)
        return text

    def get_chat_template(self) -> str:
        """Return the chat template."""
        return self.chat_template or ""

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> dict[str, Any]:
        """Encode a conversation as the template writes it, with the assistant's tokens marked.

        Raises:
            jinja2.TemplateError: the template refuses it.
        """
        written = self._template.render(
            messages=conversation,
            tools=None,
            documents=None,
            add_generation_prompt=options.get("add_generation_prompt", False),
            **self.special_tokens,
        )
        pieces = written.replace(_END, _BEGIN).split(_BEGIN)  # marked ones are the odd ones
        encoded = self.encoder.encode("".join(pieces), add_special_tokens=False)
        mask, start = [0] * len(encoded.ids), 0
        for number, piece in enumerate(pieces):
            stop = start + len(piece)
            if number % 2 and piece:
                _mark(mask, encoded.char_to_token(start), encoded.char_to_token(stop - 1))
            start = stop
        return {"input_ids": encoded.ids, "assistant_masks": mask}

    @cached_property
    def _template(self) -> Template:
        """Return the template as transformers compiles it: its settings, filters and functions."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def to_json(value: Any, **options: Any) -> str:
            return json.dumps(value, **{"ensure_ascii": False, **options})

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_marks(), "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
        return environment.from_string(self.get_chat_template())


def load_plain_tokenizer(folder: Path) -> PlainTokenizer:
    """Load the tokenizer of an artifact set.

    Raises:
        ModelError: the set is not whole, or the library can't read its tokenizer.
    """
    return plain_tokenizer(folder, read_artifact(folder))


def plain_tokenizer(folder: Path, artifact: Artifact | Export) -> PlainTokenizer:
    """Load the tokenizer in a folder; `artifact` says what is not in its file.

    Raises:
        ModelError: the library can't read it.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    try:
        encoder = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ModelError(f"can't load the tokenizer {path}: {str(error)[:300]}") from None
    encoder.no_truncation()
    encoder.no_padding()
    return PlainTokenizer(
        encoder,
        artifact.bos_token_id,
        artifact.eos_token_id,
        artifact.chat_template,
        artifact.special_tokens,
    )


def tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer of transformers has beside what is in its tokenizer.json."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
        "special_tokens": {
            name: token
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        },
    }


def _mark(mask: list[int], first: int | None, last: int | None) -> None:
    """Mark tokens from the first to the last; without a last one, to the end."""
    if first is not None:
        stop = len(mask) if last is None else last + 1
        mask[first:stop] = [1] * (stop - first)


def _marks() -> Any:
    """Return the extension of jinja2 that puts signs around {% generation %} blocks."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Marks(Extension):
        tags = {"generation"}  # noqa: RUF012  jinja2 has it so

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body: Sequence[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            begin, end = (
                nodes.Output([nodes.TemplateData(sign)]).set_lineno(line) for sign in (_BEGIN, _END)
            )
            return [begin, *body, end]

    return Marks
