"""Tokens are drawn as said, on either backend as transformers draws them; text comes whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import base_tiny
from edge_client.chat.generate import CHUNK, Reading, chooser, generate
from edge_client.chat.onnx_model import OnnxDecoder
from edge_client.chat.providers import CPU, Candidate
from edge_client.chat.text import Growing, written
from edge_client.chat.torch_model import TorchDecoder
from edge_client.data.plain_tokenizer import plain_tokenizer
from edge_client.errors import DataError, ModelError
from edge_client.exports.manifest import GRAPH, check_export
from edge_client.model import load_tokenizer
from tests.edge_client.data.test_tokenize import REFUSING, make_tokenizer
from tests.edge_client.exports.models import exported_base, llama, needs_optimum

GREEDY = chooser(0, 1, None)
TEXT = "the cat sat on the mat, " * 12  # more tokens than are read at once


class Counting:
    """Predict the number after the last token, and remember what was asked."""

    def __init__(self) -> None:
        self.fed: list[list[int]] = []
        self.length = 0

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.fed.append(list(ids))
        self.length += len(ids)
        return np.eye(1000, dtype=np.float32)[ids[-1] + 1]

    def keep(self, length: int) -> None:
        assert length <= self.length
        self.length = length


def test_what_was_read_is_not_read_again_and_long_prompts_come_in_parts() -> None:
    decoder = Counting()
    reading = Reading(decoder)
    assert list(generate(reading, [1, 2, 3], GREEDY, {7}, 99)) == [4, 5, 6]
    assert decoder.fed == [[1, 2, 3], [4], [5], [6]]
    assert list(generate(reading, [1, 2, 3, 4, 9, 9], GREEDY, {}, 2)) == [10, 11]
    assert decoder.fed[4:] == [[9, 9], [10]]  # the last that is drawn is not read
    assert list(generate(reading, [1, 2], GREEDY, {}, 1)) == [3]
    assert decoder.fed[6:] == [[2]]  # logits are those after the prompt's last token
    reading.forget()
    reading.read(list(range(CHUNK + 3)))
    assert [len(part) for part in decoder.fed[7:]] == [CHUNK, 3]


def test_output_that_is_no_number_ends_it() -> None:
    class Broken(Counting):
        def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
            return np.full(9, np.nan, np.float32)

    with pytest.raises(ModelError, match="not a number"):
        list(generate(Reading(Broken()), [1], GREEDY, {}, 3))


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=30), st.integers(0, 9))
def test_the_likeliest_is_taken_where_nothing_else_may_be(logits: list[float], seed: int) -> None:
    given = np.array(logits, np.float32)
    assert given[chooser(0, 1, seed)(given)] == given.max()
    assert given[chooser(1, 0, seed)(given)] == given.max()


def test_words_are_drawn_by_their_weight_among_the_likeliest() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.3, 0.1], np.float32))
    draws = [chooser(1, 0.75, seed)(logits) for seed in range(400)]
    assert set(draws) == {1, 2}  # together 0.8: the fewest that have 0.75
    assert 0.55 < draws.count(1) / 400 < 0.70  # 0.5 of 0.8
    hot = [chooser(50, 1, seed)(logits) for seed in range(400)]
    assert all(60 < hot.count(token) < 140 for token in range(4))
    again, other = chooser(1, 1, 3), chooser(1, 1, 3)
    assert [again(logits) for _ in range(20)] == [other(logits) for _ in range(20)]


@needs_optimum
@pytest.mark.parametrize("base", [base_tiny.PATH, None])
def test_both_backends_answer_as_transformers_does(base: Path | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = base or llama()
    tokenizer = load_tokenizer(folder)
    export = exported_base(folder, "onnx")
    plain = plain_tokenizer(export, check_export(export))
    turns = [{"role": "user", "content": TEXT}]
    ids = written(tokenizer, turns)
    assert written(plain, turns) == ids and len(ids) > CHUNK
    assert plain.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    net: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = net.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    wanted = whole[0, len(ids) :].tolist()
    for decoder in (
        OnnxDecoder(export / GRAPH, [Candidate(CPU)], 1),
        TorchDecoder(folder, None, 1),
    ):
        assert list(generate(Reading(decoder), ids, GREEDY, {}, 24)) == wanted


@given(st.text(max_size=60), st.integers(0, 5))
def test_pieces_are_whole_characters_and_together_the_text(text: str, before: int) -> None:
    tokenizer = make_tokenizer(ends=False)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    head = tokenizer("the cat", add_special_tokens=False)["input_ids"][:before]
    growing = Growing(tokenizer.decode, head)
    pieces = [growing.push(token) for token in ids]
    assert "".join(pieces) + growing.end() == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


def test_what_ends_within_a_character_is_shown_at_the_end() -> None:
    tokenizer = make_tokenizer(ends=False)
    ids = tokenizer("a€", add_special_tokens=False)["input_ids"]
    growing = Growing(tokenizer.decode)
    assert [growing.push(token) for token in ids[:-1]] == ["a", "", ""]
    assert growing.end() == "�"


def test_a_model_without_a_template_continues_the_text_and_nothing_is_nothing() -> None:
    turns = [{"role": "user", "content": "who?"}, {"role": "user", "content": "the cat"}]
    tokenizer = make_tokenizer()
    assert tokenizer.decode(written(tokenizer, turns)) == "<s>the cat"
    with pytest.raises(DataError, match="no tokens"):
        written(make_tokenizer(ends=False), [{"role": "user", "content": ""}])
    with pytest.raises(DataError, match=r"refuses the conversation \(roles must alternate\)"):
        written(make_tokenizer(template=REFUSING), turns)
