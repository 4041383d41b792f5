"""Check what is learnt of each kind of example, with a small BPE trained on the spot."""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.data.example import Completion, Example, Turn
from edge_client.data.tokenize import IGNORED, TokenSequence, tokenize
from edge_client.errors import DataError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
UNMARKED = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


def make_tokenizer(*, ends: bool = True, template: str | None = None) -> Any:
    """Return a byte-level BPE of a few hundred tokens, whose model reads 16 tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat sat on the mat, and the dog sat on the log"] * 5, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>"} if ends else {}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=16, clean_up_tokenization_spaces=False, **special
    )
    fast.chat_template = template
    return fast


TOKENIZER = make_tokenizer()
BARE = make_tokenizer(ends=False)


def text(content: str, line: int = 1) -> Example:
    """Return a text example."""
    return Example("text", content, Path("a.jsonl"), line)


def chat(*turns: tuple[str, str]) -> Example:
    """Return a conversation."""
    return Example("messages", tuple(Turn(*turn) for turn in turns), Path("c.jsonl"), 7)


def learnt(sequences: list[TokenSequence]) -> list[int]:
    """Return every target that counts, in order."""
    return [int(label) for s in sequences for label in s.labels if label != IGNORED]


def test_a_text_has_both_ends_and_shifted_labels() -> None:
    (sequence,) = tokenize([text("the cat")], TOKENIZER, 64)
    assert TOKENIZER.decode(sequence.ids) == "<s>the cat</s>"
    assert sequence.labels.tolist() == [*sequence.ids[1:].tolist(), IGNORED]
    assert sequence.ids.dtype == sequence.labels.dtype == "int32"


@settings(deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5
    ),
    longest=st.integers(2, 20),
)
def test_every_token_of_a_text_is_a_target_exactly_once(contents: list[str], longest: int) -> None:
    sequences = tokenize([text(content) for content in contents], TOKENIZER, longest)
    whole = [TOKENIZER(content, verbose=False)["input_ids"] for content in contents]
    end = TOKENIZER.eos_token_id
    assert learnt(sequences) == [token for ids in whole for token in [*ids, end]]
    assert all(2 <= len(s) <= longest or s.labels[0] != IGNORED for s in sequences)
    assert all(s.labels[:-1].tolist() == s.ids[1:].tolist() for s in sequences)


def test_the_last_label_of_a_piece_is_the_first_token_of_the_next() -> None:
    sequences = tokenize([text("the dog sat on the log " * 9)], TOKENIZER, 8)
    assert len(sequences) > 3
    for one, following in pairwise(sequences):
        assert len(one) == 8 and one.labels[-1] == following.ids[0]
    assert learnt(sequences)[-1] == TOKENIZER.eos_token_id


def test_without_end_tokens_the_first_token_is_no_target() -> None:
    (sequence,) = tokenize([text("the cat")], BARE, 64)
    ids = BARE("the cat")["input_ids"]
    assert sequence.ids.tolist() == ids and learnt([sequence]) == ids[1:]


@pytest.mark.parametrize("longest", [5, 64])
def test_of_a_completion_only_the_answer_and_the_end_are_learnt(longest: int) -> None:
    pair = Completion("what sat on the mat? ", "the cat sat on the mat")
    example = Example("completion", pair, Path("p.csv"), 2)
    sequences = tokenize([example], TOKENIZER, longest)
    assert TOKENIZER.decode(learnt(sequences)) == pair.completion + "</s>"
    assert all((s.labels != IGNORED).any() for s in sequences)
    if longest == 64:
        assert TOKENIZER.decode(sequences[0].ids) == "<s>" + pair.prompt + pair.completion + "</s>"


def test_of_a_conversation_the_marked_turns_are_learnt() -> None:
    talk = chat(("user", "who?"), ("assistant", "the cat"), ("user", "and"), ("assistant", "dog"))
    sequences = tokenize([talk, chat(("user", "the log"))], make_tokenizer(template=MARKED), 64)
    assert TOKENIZER.decode(learnt(sequences)) == "the cat</s>dog</s>"
    assert len(sequences) == 1  # nothing of the second is learnt
    decoded = TOKENIZER.decode(sequences[0].ids)
    assert decoded == "<s><user>who?<assistant>the cat</s><user>and<assistant>dog</s>"


def test_of_a_conversation_all_is_learnt_where_nothing_is_marked() -> None:
    (sequence,) = tokenize(
        [chat(("user", "who?"), ("assistant", "the cat"))], make_tokenizer(template=UNMARKED), 64
    )
    assert TOKENIZER.decode(sequence.ids) == "<user>who?</s><assistant>the cat</s>"
    assert learnt([sequence]) == sequence.ids[1:].tolist()


def test_a_model_without_a_template_says_what_to_use() -> None:
    with pytest.raises(DataError, match=r"c\.jsonl:7 .*no chat template.*'prompt' and 'comple"):
        tokenize([chat(("user", "q"))], TOKENIZER, 64)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    with pytest.raises(DataError, match=r"refuses c\.jsonl:7 \(roles must alternate\)"):
        tokenize([chat(("user", "q"))], make_tokenizer(template=REFUSING), 64)


def test_without_jinja_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DataError, match="pip install jinja2"):
        tokenize([chat(("user", "q"))], make_tokenizer(template=MARKED), 64)


def test_nothing_to_learn_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="turn of the assistant"):
        tokenize([chat(("user", "q"))], make_tokenizer(template=MARKED), 64)
    assert tokenize([], TOKENIZER, 64) == []
    with pytest.raises(ValueError, match="at least 2"):
        tokenize([text("a")], TOKENIZER, 1)


def test_kinds_keep_their_order_over_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # By import_module, as the package's attribute of that name is the function.
    module = import_module("edge_client.data.tokenize")
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    pair = Completion("p", "answer")
    examples = [
        text("first", 1),
        Example("completion", pair, Path("a"), 2),
        chat(("assistant", "third")),
        text("fourth and long", 4),
        text("fifth", 5),
    ]
    sequences = tokenize(examples, make_tokenizer(template=MARKED), 64)
    said = [TOKENIZER.decode(learnt([sequence])) for sequence in sequences]
    assert said == ["first</s>", "answer</s>", "third</s>", "fourth and long</s>", "fifth</s>"]


def test_a_long_text_gives_no_length_warning(caplog: pytest.LogCaptureFixture) -> None:
    transformers.utils.logging.enable_propagation()
    try:
        fresh = make_tokenizer(template=MARKED)
        tokenize([text("the cat " * 100), chat(("assistant", "the cat " * 100))], fresh, 8)
        assert caplog.records == []
        fresh("the cat " * 100)
        assert "longer than" in caplog.text  # it would be seen
    finally:
        transformers.utils.logging.disable_propagation()
