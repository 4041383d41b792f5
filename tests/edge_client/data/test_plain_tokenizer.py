"""The tokenizer without transformers: the same ids, ends and marks as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import base_tiny
from edge_client.data.example import Completion, Example
from edge_client.data.plain_tokenizer import PlainTokenizer, tokenizer_fields
from edge_client.data.tokenize import tokenize
from edge_client.errors import DataError
from edge_client.model import load_tokenizer
from tests.edge_client.data.test_tokenize import (
    MARKED,
    REFUSING,
    UNMARKED,
    chat,
    make_tokenizer,
    text,
)

LOOPS = (
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}"
    "{% endfor %}"
)
# transformers leaves out a marked block that nothing was written before.
BLOCKS = """chat
{% for m in messages %}
  {% if m['role'] == 'assistant' %}
    {% generation %}
    {{ m['content'] }}
    {% endgeneration %}
  {% endif %}
{% endfor %}"""


def plain(tokenizer: Any) -> PlainTokenizer:
    """Return the plain one of a transformers tokenizer, as an export describes it."""
    fields = tokenizer_fields(tokenizer)
    encoder = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    return PlainTokenizer(encoder, **fields)


def same(examples: list[Example], tokenizer: Any) -> None:
    ours, theirs = (tokenize(examples, t, 16) for t in (plain(tokenizer), tokenizer))
    assert [s.ids.tolist() for s in ours] == [s.ids.tolist() for s in theirs]
    assert [s.labels.tolist() for s in ours] == [s.labels.tolist() for s in theirs]


@settings(max_examples=100)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_texts_have_the_same_ids(texts: list[str]) -> None:
    base = load_tokenizer(base_tiny.PATH)
    same([text(t) for t in texts], base)


def test_prompts_have_the_same_ids_and_labels() -> None:
    pair = Completion("the cat ", "sat on the <s> mat")
    same([Example("completion", pair, Path("a.jsonl"), 1)], make_tokenizer())


@pytest.mark.parametrize("template", [MARKED, UNMARKED, LOOPS, BLOCKS])
def test_conversations_are_written_and_marked_alike(template: str) -> None:
    turns = [
        ("user", "the cat?"),
        ("assistant", "sat <é>"),
        ("assistant", "and the dog"),
        ("user", ""),
    ]
    same([chat(*turns), chat(*turns[:2])], make_tokenizer(template=template))


def test_a_template_that_refuses_names_the_row() -> None:
    with pytest.raises(DataError, match="roles must alternate"):
        tokenize([chat(("user", "a"))], plain(make_tokenizer(template=REFUSING)), 16)


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        tokenize([chat(("user", "a"))], plain(make_tokenizer()), 16)


def test_one_text_is_encoded_as_one_of_several() -> None:
    tokenizer = plain(load_tokenizer(base_tiny.PATH))
    assert tokenizer("import os")["input_ids"] == tokenizer(["import os"])["input_ids"][0]
