"""A file of settings as somebody wrote it by hand, in TOML or JSON, and what is wrong with it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.errors import TunefleetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHOWN = 60
"""Characters of a wrong line that are shown."""


def line_of(text: str, setting: Sequence[str]) -> int | None:
    """Return the line of a TOML file in which a setting, by its tables' names and its own, is set.

    None where it is not found: a file can be written in ways that this does not follow.
    """
    table: tuple[str, ...] = ()
    best: tuple[int, int] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.fullmatch(r"\s*\[\[?([^\]]+)\]\]?\s*(#.*)?", line):
            table = _keys(header[1])
            name = table
        elif key := re.match(r"\s*([\w.\-\"' ]+?)\s*=", line):
            name = (*table, *_keys(key[1]))
        else:
            continue
        if name == tuple(setting[: len(name)]) and (best is None or len(name) > best[0]):
            best = len(name), number
    return best[1] if best else None


def _keys(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def read_settings(path: Path, what: str, refusal: type[TunefleetError]) -> dict[str, Any]:
    """Read a file of settings: TOML, or JSON where its name ends so; `what` it is, say "job file".

    Raises:
        TunefleetError: a `refusal`: it is not there, not UTF-8, or not in its format; says in which
            line.
    """
    named = f"the {what} {path}"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise refusal(f"can't read {named}: there is no such file") from None
    except OSError as error:
        raise refusal(f"can't read {named}: {(error.strerror or str(error)).lower()}") from None
    try:
        text = data.decode("utf-8-sig")  # some editors begin with a byte-order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refusal(
            f"can't read {named}: line {line} is not UTF-8 text; save it as UTF-8"
        ) from None
    in_json = path.suffix == ".json"
    try:
        fields = json.loads(text) if in_json else tomllib.loads(text)
    except RecursionError:
        raise refusal(f"can't read {named}: it is nested too deeply") from None
    except ValueError as error:
        why = _in_json(error, text) if in_json else _in_toml(error, text)
        raise refusal(f"can't read {named}: {why}") from None
    if not isinstance(fields, dict):
        raise refusal(f"{named} is not an object with settings")
    return fields


def _in_json(error: ValueError, text: str) -> str:
    line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
    return f"{_place(text, line)} is not JSON"


def _in_toml(error: ValueError, text: str) -> str:
    said = str(error)
    found = re.search(r"\(at line (\d+), column \d+\)", said)
    last = len(text.rstrip().splitlines())  # "at end of document"
    where = _place(text, int(found[1]) if found else last)
    if any(word in said for word in ("overwrite", "twice", "uplicate", "immutable")):
        return f"{where} sets what is set already; leave one of them"
    return f'{where} is not TOML; write name = value, text in "quotes", tables as [name]'


def _place(text: str, line: int) -> str:
    """Return a line's number and what stands there."""
    lines = text.splitlines()
    content = lines[line - 1].strip() if line <= len(lines) else ""
    shown = content if len(content) <= SHOWN else content[: SHOWN - 1] + "…"
    return f"line {line} ({shown})" if shown and shown.isprintable() else f"line {line}"
