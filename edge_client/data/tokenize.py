"""Turn examples into token sequences whose labels say what is learnt at each position."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_client.data.example import Completion, Example, counted
from edge_client.errors import DataError

IGNORED = -100
"""The label of a position that has no target, or one that doesn't count in the loss."""

BATCH_CHARACTERS = 1_000_000
"""What is encoded at once: enough for speed; the tokenizer takes some 50 bytes a character."""

_GENERATION = re.compile(r"\{%-?\s*generation\b")


class Tokenizer(Protocol):
    """Name what is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    is_fast: bool
    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Any:
        """Encode a batch of texts."""

    def get_chat_template(self) -> str:
        """Return the template that is used when none is named."""

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> Any:
        """Encode a batch of conversations."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """Hold tokens of one text, and at each position the token to be predicted there.

    ids (n,) int32; labels (n,) int32, already shifted: labels[t] is the token after ids[t], or
    -100 where there is none or it doesn't count.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


Encoded = tuple[list[int], Sequence[bool | int]]
"""The tokens of a whole example, and for each whether it is to be learnt."""


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_tokens: int,
    progress: Callable[[], object] = lambda: None,
) -> list[TokenSequence]:
    """Encode the examples, cut into sequences of at most `max_tokens` tokens, in their order.

    What is learnt: of a text all, with an end token; of a completion its own tokens and the end
    token, not the prompt; of messages the assistant's where the chat template marks them with
    {% generation %}, otherwise all. Where a text is cut, the last label of one sequence is the
    first token of the next, so no target is lost. Sequences with no target are left out.
    `progress` is called after each batch of examples.

    Raises:
        DataError: there are messages but the model has no chat template, or its template refuses
            one of them; or there is no token to learn in any example.
        ValueError: max_tokens is below 2.
    """
    if max_tokens < 2:
        raise ValueError(f"a sequence has at least 2 tokens, not {max_tokens}")
    encoders: dict[str, Callable[[Sequence[Example], Tokenizer], Iterator[Encoded]]] = {
        "text": _encode_texts,
        "completion": _encode_completions,
        "messages": _encode_messages,
    }
    sequences: dict[int, list[TokenSequence]] = {}
    for kind, encode in encoders.items():
        indices = [i for i, example in enumerate(examples) if example.kind == kind]
        for some in _batches(indices, examples):
            encoded = encode([examples[i] for i in some], tokenizer)
            for index, (ids, learnt) in zip(some, encoded, strict=True):
                sequences[index] = list(_cut(ids, learnt, max_tokens))
            progress()
    in_order = [sequence for i in range(len(examples)) for sequence in sequences[i]]
    if examples and not in_order:
        raise DataError(
            f"{counted(len(examples), 'example')} without a token to learn, the first in "
            f"{_where(examples[0])}; messages need a turn of the assistant"
        )
    return in_order


def _where(example: Example) -> str:
    return f"{example.source}:{example.line}"


def _batches(indices: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
    """Yield the indices in batches that bound the memory that encoding takes."""
    batch: list[int] = []
    characters = 0
    for index in indices:
        batch.append(index)
        characters += examples[index].characters
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cut(ids: list[int], learnt: Sequence[bool | int], longest: int) -> Iterator[TokenSequence]:
    """Yield the sequences of one example that hold a target, labels shifted before the cut."""
    tokens = np.asarray(ids, np.int32)  # (n,)
    labels = np.full_like(tokens, IGNORED)  # (n,)
    labels[:-1] = np.where(np.asarray(learnt[1:], bool), tokens[1:], IGNORED)
    for start in range(0, len(tokens), longest):
        part = slice(start, start + longest)
        if (labels[part] != IGNORED).any():
            yield TokenSequence(tokens[part], labels[part])


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Encode plain strings with no special tokens around them."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning that a text is longer than the model's context: it gets cut
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a text; either may be wanting."""
    pair = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    before, after = ([] if token is None else [token] for token in pair)
    return before, after


def _encode_texts(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yield bos + text + eos, all to be learnt."""
    bos, eos = _ends(tokenizer)
    for text in _encode([str(example.payload) for example in examples], tokenizer):
        ids = bos + text + eos
        yield ids, [True] * len(ids)


def _encode_completions(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yield bos + prompt + completion + eos, the last two to be learnt.

    The prompt is encoded by itself, as it will be when the model is asked to complete it.
    """
    bos, eos = _ends(tokenizer)
    pairs = [e.payload for e in examples if isinstance(e.payload, Completion)]
    prompts = _encode([pair.prompt for pair in pairs], tokenizer)
    completions = _encode([pair.completion for pair in pairs], tokenizer)
    for prompt, completion in zip(prompts, completions, strict=True):
        given, answer = bos + prompt, completion + eos
        yield given + answer, [False] * len(given) + [True] * len(answer)


def _encode_messages(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yield conversations as the model's chat template writes them."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{_where(examples[0])} holds messages, but the model has no chat template to write "
            "them with; use rows with 'prompt' and 'completion', or a model made for chat"
        )
    marks = tokenizer.is_fast and bool(_GENERATION.search(tokenizer.get_chat_template()))
    for row in _apply_template(examples, tokenizer, marks):
        ids = row["input_ids"]
        yield ids, row["assistant_masks"] if marks else [True] * len(ids)


def _apply_template(
    examples: Sequence[Example], tokenizer: Tokenizer, marks: bool
) -> Iterator[Mapping[str, list[int]]]:
    """Yield each conversation's tokens, and its assistant mask where the template marks turns."""
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise DataError(
            f"{_where(examples[0])} holds messages, and to write them as the model's chat "
            "template says needs jinja2; install it with: pip install jinja2"
        ) from error
    for example in examples:
        conversation = [
            {"role": turn.role, "content": turn.content}
            for turn in example.payload
            if not isinstance(turn, str)
        ]
        try:
            # One at a time, so that a refusal names its row; writing it out takes most of the time.
            encoded: Mapping[str, list[int]] = tokenizer.apply_chat_template(
                conversation,
                return_dict=True,
                return_assistant_tokens_mask=marks,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses {_where(example)} ({error}); "
                "mend that row or leave it out"
            ) from error
        yield encoded
