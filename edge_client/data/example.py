"""Hold one text of a device, made of a row whose fields may be anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

FIELDS = ("text", "messages", "prompt", "completion")
"""The fields of a row that are read; any other is left alone."""

ACCEPTED = (
    ".txt, .md and .py files (a document each), and rows of .jsonl, .csv and .parquet files "
    "with 'text', or 'messages', or 'prompt' and 'completion'"
)
"""What a person may give, in words."""


class Turn(NamedTuple):
    """Name who speaks in a conversation ("system", "user", "assistant") and what is said."""

    role: str
    content: str


class Completion(NamedTuple):
    """Pair what is given to the model with what it should answer."""

    prompt: str
    completion: str


Kind = Literal["text", "messages", "completion"]
Payload = str | tuple[Turn, ...] | Completion


class BadRow(ValueError):
    """A row that can't be learnt from; the reader names it and goes on."""


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one thing to learn from, and the file and line (from 1) where it was found.

    The payload is a str for "text", a tuple of turns for "messages" and a `Completion` for
    "completion". In a .parquet file the line is the number of the row.
    """

    kind: Kind
    payload: Payload
    source: Path
    line: int

    @property
    def strings(self) -> tuple[str, ...]:
        """Return every string of the payload in order, roles included."""
        if isinstance(self.payload, str):
            return (self.payload,)
        if isinstance(self.payload, Completion):
            return tuple(self.payload)
        return tuple(part for turn in self.payload for part in turn)

    @property
    def characters(self) -> int:
        """Return the length in characters."""
        return sum(map(len, self.strings))


def counted(number: int, noun: str) -> str:
    """Return a number of things: "1 row", "2 rows"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def example_of_row(row: object, source: Path, line: int) -> Example:
    """Return the example of a row; an absent field and a null one are the same.

    Raises:
        BadRow: it isn't an object, lacks a field, or a field is empty or of another type.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row is an object with fields, not {_kind_of_json(row)}")
    fields = {name: row[name] for name in FIELDS if row.get(name) is not None}
    if "text" in fields:
        return Example("text", _filled("text", fields["text"]), source, line)
    if "messages" in fields:
        return Example("messages", _turns(fields["messages"]), source, line)
    if "prompt" in fields and "completion" in fields:
        prompt = _filled("prompt", fields["prompt"])
        completion = _filled("completion", fields["completion"])
        return Example("completion", Completion(prompt, completion), source, line)
    raise BadRow("it has neither 'text', nor 'messages', nor 'prompt' with 'completion'")


def _filled(name: str, value: object) -> str:
    """Return the value as a string that holds more than white space."""
    text = _string(name, value)
    if not text.strip():
        raise BadRow(f"{name!r} is empty")
    return text


def _string(name: str, value: object) -> str:
    """Return the value as a string that UTF-8 can hold: no tokenizer takes a lone surrogate."""
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is {_kind_of_json(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name!r} is not valid UTF-8") from None
    return value


def _turns(value: object) -> tuple[Turn, ...]:
    """Return the turns of a conversation, which a .csv file holds as JSON text."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except BadRow:
            raise BadRow("'messages' is a string, not a list (nor a list's JSON)") from None
    if not isinstance(value, list):
        raise BadRow(f"'messages' is {_kind_of_json(value)}, not a list")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRow("each of 'messages' is an object with 'role' and 'content'")
        turns.append(Turn(_filled("role", turn["role"]), _string("content", turn["content"])))
    if not any(turn.content.strip() for turn in turns):
        raise BadRow("'messages' is empty")
    return tuple(turns)


def parse_json(text: str) -> object:
    """Read JSON text.

    Raises:
        BadRow: it isn't JSON, or is nested too deep to be read.
    """
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError):
        raise BadRow("not JSON that can be read: nested too deep, or a number too long") from None
    return value


def _kind_of_json(value: object) -> str:
    """Return in words what sort of value it is."""
    if value is None:
        return "null"
    words = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return words.get(type(value), f"a value of type {type(value).__name__}")
