"""Check the laws of the split: no overlap, nothing lost, the asked shares, the same every time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.data.example import Completion, Example, Turn
from edge_client.data.read import Problem
from edge_client.data.split import Splits, cut_text, split_examples
from edge_client.errors import DataError

SHARES = (0.8, 0.08, 0.12)


def text(content: str, line: int = 1, source: str = "a.jsonl") -> Example:
    """Return a text example."""
    return Example("text", content, Path(source), line)


def prose(seed: int, paragraphs: int) -> str:
    """Return a document of paragraphs of 40 to 900 characters, all different."""
    rng = random.Random(seed)
    return "\n\n".join(
        " ".join(f"{rng.getrandbits(30):x}" for _ in range(rng.randint(5, 110)))
        for _ in range(paragraphs)
    )


def parts(splits: Splits) -> tuple[list[Example], list[Example], list[Example]]:
    """Return the three splits."""
    return splits.train, splits.trust, splits.held_out


def contents(examples: list[Example]) -> set[str]:
    """Return the contents up to white space."""
    return {" ".join(" ".join(example.strings).split()) for example in examples}


words = st.text(alphabet="ab c\n", min_size=1, max_size=12).filter(str.strip)


@given(rows=st.lists(words, max_size=60), seed=st.integers(0, 2**32))
def test_no_content_is_in_two_splits_and_none_is_lost(rows: list[str], seed: int) -> None:
    examples = [text(row, line) for line, row in enumerate(rows, start=1)]
    distinct = contents(examples)
    if len(distinct) < 3:
        with pytest.raises(DataError, match=r"at least 3 different texts.*(is [01]|are [02]);"):
            split_examples(examples, seed=seed)
        return
    splits = split_examples(examples, seed=seed)
    train, trust, held_out = map(contents, parts(splits))
    assert train and trust and held_out
    assert not train & trust and not train & held_out and not trust & held_out
    assert train | trust | held_out == distinct
    assert sorted(e.line for part in parts(splits) for e in part) == list(range(1, len(rows) + 1))


@given(rows=st.lists(words, min_size=3, max_size=40, unique_by=lambda row: "".join(row.split())))
def test_the_order_of_the_examples_does_not_matter(rows: list[str]) -> None:
    examples = [text(row, line) for line, row in enumerate(rows, start=1)]
    assert split_examples(examples, seed=5) == split_examples(examples[::-1], seed=5)


def test_the_seed_decides() -> None:
    examples = [text(f"row {i}", i) for i in range(100)]
    assert split_examples(examples, seed=1) == split_examples(examples, seed=1)
    assert split_examples(examples, seed=1) != split_examples(examples, seed=2)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(50, 2000), min_size=100, max_size=200), seed=st.integers(0, 99))
def test_a_hundred_rows_come_out_near_the_shares(lengths: list[int], seed: int) -> None:
    rng = random.Random(seed)
    examples = [
        text("".join(rng.choices("abcdefgh ", k=length)), i) for i, length in enumerate(lengths)
    ]
    check_shares(split_examples(examples, seed=seed), sum(e.characters for e in examples))


@settings(deadline=None, max_examples=20)
@given(documents=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_few_or_uneven_documents_come_out_near_the_shares(documents: int, seed: int) -> None:
    sizes = [400, *[400 // (i + 1) for i in range(documents - 1)]]
    examples = [
        text(prose(1000 * seed + i, size), source=f"{i}.txt") for i, size in enumerate(sizes)
    ]
    splits = split_examples(examples, seed=seed)
    total = sum(e.characters for part in parts(splits) for e in part)
    check_shares(splits, total)


def check_shares(splits: Splits, total: int) -> None:
    """Check each split's characters: off its share by 3 points, or by the longest piece at most.

    Pieces are not cut again, so a boundary between splits can't be finer than one of them.
    """
    longest = max(e.characters for part in parts(splits) for e in part)
    tolerance = max(0.03, longest / total)
    for part, share in zip(parts(splits), SHARES, strict=True):
        assert abs(sum(e.characters for e in part) / total - share) <= tolerance


def test_few_documents_are_cut_and_enough_rows_are_not() -> None:
    document = prose(1, 200)
    pieces = [e for part in parts(split_examples([text(document)], seed=1)) for e in part]
    assert len(pieces) > 30 and all(0 < e.characters <= 2000 for e in pieces)
    rows = [text(prose(i, 12), i) for i in range(25)]
    whole = [e for part in parts(split_examples(rows, seed=1)) for e in part]
    assert sorted(whole, key=lambda e: e.line) == rows


def test_more_text_later_moves_nothing_from_held_out_to_train() -> None:
    rows = [text(f"row {i} " + "x" * (i % 50), i) for i in range(1000)]
    before, after = split_examples(rows[:600], seed=3), split_examples(rows, seed=3)
    assert not contents(before.held_out) & contents(after.train)
    assert not contents(before.train) & contents(after.held_out)


def test_conversations_and_completions_are_split_whole() -> None:
    turns = [
        Example("messages", (Turn("user", f"q{i}"), Turn("assistant", "a")), Path("a"), i)
        for i in range(10)
    ]
    pairs = [Example("completion", Completion(f"p{i}", "c"), Path("b"), i) for i in range(10)]
    splits = split_examples([*turns, *pairs], seed=0)
    assert sum(map(len, parts(splits))) == 20


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.5, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_shares_that_are_no_shares_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        split_examples([text("a"), text("b"), text("c")], shares=shares, seed=0)


@given(
    content=st.text(alphabet=st.sampled_from("abc  \n\n\r\t"), max_size=400),
    limit=st.integers(2, 60),
)
def test_cutting_loses_only_white_space(content: str, limit: int) -> None:
    pieces = cut_text(content, limit)
    assert all(piece.strip() and len(piece) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(content.split())


def test_blank_lines_before_the_first_paragraph_are_no_part_of_it() -> None:
    assert cut_text("\n \na", 2) == ["a"]


def test_cutting_prefers_blank_lines_then_line_ends_then_spaces() -> None:
    assert cut_text("aaaa\naaaa\n\n    bbbb\nbbbb", 20) == ["aaaa\naaaa", "    bbbb\nbbbb"]
    assert cut_text("aaaa aaaa\nbbbb bbbb", 12) == ["aaaa aaaa", "bbbb bbbb"]
    assert cut_text("aaaa bbbb cccc", 10) == ["aaaa bbbb ", "cccc"]
    assert cut_text("abcdef", 4) == ["abcd", "ef"]


def test_rows_left_out_are_named_where_there_are_too_few(tmp_path: Path) -> None:
    problems = [Problem(tmp_path / "a.jsonl", line, "'text' is empty") for line in (4, 7)]
    few = [text("one", 1), text("two", 2)]
    with pytest.raises(DataError, match=r"; 2 rows .* first: .*a\.jsonl:4: 'text' is empty$"):
        split_examples(few, seed=0, problems=problems)
    with pytest.raises(DataError, match=r"; 1 row was left out: .*a\.jsonl:4: 'text' is empty$"):
        split_examples(few, seed=0, problems=problems[:1])
