"""Between text and tokens: what is asked as the model was taught, what comes as it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edge_client.errors import ConfigError, DataError

CONTEXT = 8
"""Tokens before the answer that are decoded with it: some tokenizers drop a space at the start."""
_UNFINISHED = "�"
Turn = dict[str, str]
"""`role` and `content`, as chat templates have them."""


class Growing:
    """Turn tokens into text as they come, never showing a part of a character.

    Byte-level tokens may end within one: what can't be shown yet is shown with what completes it.
    The pieces together are the text of all tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-CONTEXT:])
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Take the next token, and return what can be shown of it."""
        self._ids.append(token)
        return self._new(complete=True)

    def end(self) -> str:
        """Return what has not been shown, though it may end within a character."""
        return self._new(complete=False)

    def _new(self, *, complete: bool) -> str:
        shown = self._decode(self._ids[: self._shown])
        whole = self._decode(self._ids)
        new = whole[len(shown) :]
        if not new or (complete and new.endswith(_UNFINISHED)):
            return ""
        self._ids = self._ids[max(0, self._shown - CONTEXT) :]
        self._shown = len(self._ids)
        return new


def written(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    """Return the tokens of a conversation, up to where the answer begins.

    As the model's chat template writes it; without one, the last turn's text is to be continued.

    Raises:
        ConfigError: jinja2 is not installed.
        DataError: the template refuses the conversation, or there is nothing to continue.
    """
    if not tokenizer.chat_template:
        ids: list[int] = tokenizer([turns[-1]["content"]], add_special_tokens=False)["input_ids"][0]
        start = tokenizer.bos_token_id
        ids = ids if start is None else [start, *ids]
    else:
        ids = _by_template(tokenizer, turns)
    if not ids:
        raise DataError("there is nothing to answer: the text has no tokens")
    return ids


def _by_template(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    try:
        from jinja2 import TemplateError
    except ImportError:
        raise ConfigError(
            "to write a conversation as the model's chat template says needs jinja2: pip install "
            "jinja2"
        ) from None
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, return_dict=True
        )["input_ids"]
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses the conversation ({error})") from None
    return ids
