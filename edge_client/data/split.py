"""Split a device's examples into what it trains on, what guards trust, and what is held out.

Every piece of text has a place on a line, given by a hash of its content and the seed. The line
is cut into train | trust | held_out by characters. So equal pieces are never parted, the order
of the files doesn't matter, and when text is added later only pieces near a cut change sides:
hardly ever from held_out to train, which do not touch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from edge_client.data.example import Example
from edge_client.data.read import Problem
from edge_client.errors import DataError

SHARES = (0.8, 0.08, 0.12)
"""Shares of the characters: train, trust, held_out."""

ENOUGH_EXAMPLES = 20
LARGE_SHARE = 0.06  # a text above it would put a split off by more than 3 points
PIECE_CHARACTERS = (300, 2000)
PIECES_WANTED = 50

_BLANK_LINES = re.compile(r"(?:\n[ \t\r]*)+\n")


@dataclass(frozen=True, slots=True)
class Splits:
    """Hold the three parts of a device's examples; no content is in two of them.

    `train` is what the adapter learns from, `trust` what the device checks an adapter of the
    fleet on before it takes it, and `held_out` what the reported loss is measured on.
    """

    train: list[Example]
    trust: list[Example]
    held_out: list[Example]


def split_examples(
    examples: Sequence[Example],
    *,
    shares: tuple[float, float, float] = SHARES,
    seed: int,
    problems: Sequence[Problem] = (),
) -> Splits:
    """Split the examples by the shares of their characters: train, trust, held_out.

    With fewer than 20 examples every longer text is cut at its blank lines first, otherwise only
    a text that holds more than 6% of all characters. `problems` are rows that were left out, to be
    named where there are too few others.

    Raises:
        DataError: there are fewer than three different pieces.
        ValueError: the shares aren't above 0 with the sum 1.
    """
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares are above 0 and sum to 1, not {shares}")
    groups: dict[str, list[Example]] = {}
    for piece in _pieces(examples):
        groups.setdefault(_place(piece, seed), []).append(piece)
    if len(groups) < 3:
        raise DataError(
            "at least 3 different texts are needed, to train on some and hold others out, and "
            f"here {'is' if len(groups) == 1 else 'are'} {len(groups)}; give more, or a longer "
            f"text (it is cut at its blank lines){_left_out(problems)}"
        )
    line = [groups[place] for place in sorted(groups)]
    # The first cut leaves at least two groups after it, the second at least one on each side.
    ends = list(accumulate(sum(e.characters for e in group) for group in line))
    first = _nearest(ends, shares[0] * ends[-1], range(1, len(line) - 1))
    second = _nearest(ends, (shares[0] + shares[1]) * ends[-1], range(first + 1, len(line)))
    return Splits(_flat(line[:first]), _flat(line[first:second]), _flat(line[second:]))


def _left_out(problems: Sequence[Problem]) -> str:
    """Return how many rows and files were left out and why the first was; nothing if none was."""
    if not problems:
        return ""
    if len(problems) == 1:
        return f"; 1 {'row' if problems[0].line else 'file'} was left out: {problems[0]}"
    noun = "rows" if all(problem.line for problem in problems) else "rows and files"
    return f"; {len(problems)} {noun} were left out, the first: {problems[0]}"


def _nearest(ends: Sequence[int], wanted: float, cuts: range) -> int:
    """Return the cut (how many groups come before it) whose characters are nearest to wanted."""
    return min(cuts, key=lambda cut: abs(ends[cut - 1] - wanted))


def _flat(groups: Sequence[Sequence[Example]]) -> list[Example]:
    """Return the examples of the groups, equal ones in order of where they were found."""
    return [
        example
        for group in groups
        for example in sorted(group, key=lambda e: (str(e.source), e.line, e.strings))
    ]


def _place(example: Example, seed: int) -> str:
    """Return where the content stands on the line: equal up to white space, equal place."""
    content = [" ".join(string.split()) for string in example.strings]
    return hashlib.sha256(repr((seed, example.kind, content)).encode()).hexdigest()


def _pieces(examples: Sequence[Example]) -> Iterator[Example]:
    """Yield the examples, with the texts that are too long for an even split cut in pieces."""
    total = sum(example.characters for example in examples)
    shortest, longest = PIECE_CHARACTERS
    limit = min(longest, max(shortest, total // PIECES_WANTED))
    uncut = LARGE_SHARE * total if len(examples) >= ENOUGH_EXAMPLES else 0.0
    for example in examples:
        if isinstance(example.payload, str) and len(example.payload) > max(limit, uncut):
            for text in cut_text(example.payload, limit):
                yield replace(example, payload=text)
        else:
            yield example


def cut_text(text: str, limit: int) -> list[str]:
    """Cut a text at blank lines into pieces of as many paragraphs as fit `limit` characters.

    A paragraph above the limit is cut at its line ends, and a line above it at a space. Only white
    space between two pieces is lost.
    """
    pieces: list[str] = []
    start = end = 0  # the piece that is being filled
    for begin, stop in _paragraphs(text, limit):
        if end > start and stop - start > limit:
            pieces.append(text[start:end])
            end = start
        if end == start:
            start = begin
        end = stop
    pieces.append(text[start:end])
    return [piece.strip("\r\n") for piece in pieces if piece.strip()]


def _paragraphs(text: str, limit: int) -> Iterator[tuple[int, int]]:
    """Yield where each paragraph of at most `limit` characters begins and stops."""
    begin = 0
    for blank in _BLANK_LINES.finditer(text):
        yield from _cut_paragraph(text, begin, blank.start(), limit)
        begin = blank.end()
    yield from _cut_paragraph(text, begin, len(text), limit)


def _cut_paragraph(text: str, begin: int, stop: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield a paragraph's parts, cut where it hurts least: a line end, a space, anywhere."""
    while stop - begin > limit:
        cut = begin + limit
        for sign in "\n ":
            # Not in the first half, lest a part hold next to nothing.
            found = text.rfind(sign, begin + limit // 2, cut)
            if found > 0:
                cut = found + 1
                break
        yield begin, cut
        begin = cut
    if stop > begin:
        yield begin, stop
