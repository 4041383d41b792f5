"""What is wrong with a setting, in the words of somebody who wrote it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protocol.topics import NAME

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

RULES = {
    "missing": "is missing",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a table of settings",
    "model_type": "must be a table of settings",
    "too_short": "must have an entry at least",
    "too_long": "must have at most {max_length} entries",
}
"""Kind of a pydantic error → what is allowed, with what its context fills in."""
MODEL_MISSING = "model: is missing: base-tiny, a folder, a hub id, or a description (*.json)"
SHOWN = 40
"""Characters of a wrong value that are shown."""


def first_mistake(error: ValidationError, *within: str) -> str:
    """Return the first mistake in one line: the setting, what is allowed, and what it is instead.

    `within` names the table that was checked by itself.
    """
    first = error.errors(include_url=False)[0]
    if first["type"] == "missing" and first["loc"] == ("base",):
        return MODEL_MISSING  # a job file names the base by its model
    setting, said = setting_name([*within, *first["loc"]]), _allowed(first) + _instead(first)
    return f"{setting}: {said}" if setting else said


def unknown_setting(fields: Mapping[str, Any], tables: Mapping[str, Sequence[str]]) -> str:
    """Return what is wrong with the first setting that there is not; empty: all are known.

    On the wire a message may have fields that a later version added. A file is written by hand for
    this version: a name that is not known is a mistake. `tables` has the names in each table, and
    those at the top under "".
    """
    for table, known in tables.items():
        given = fields.get(table) if table else fields
        for name in given if isinstance(given, Mapping) else ():
            if name not in known:
                hint = did_you_mean(_meant(table, name, tables), known)
                return f"there is no setting {_dotted(table, name)!r}; {hint}"
    return ""


def _meant(table: str, name: str, tables: Mapping[str, Sequence[str]]) -> str | None:
    """Return the setting that was meant, if one is near: in another table, or spelt much alike."""
    elsewhere = [_dotted(other, name) for other, known in tables.items() if name in known]
    near = nearest(name, tables[table])
    return next(iter(elsewhere), _dotted(table, near) if near else None)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelt most like another, if one is much alike."""
    return next(iter(difflib.get_close_matches(name, [*known], n=1)), None)


def did_you_mean(meant: str | None, known: Iterable[str]) -> str:
    """Return a question for the name that was meant; where none is near, which there are."""
    return f"did you mean {meant!r}?" if meant else f"there are {', '.join(known)}"


def _dotted(table: str, name: str) -> str:
    return f"{table}.{name}" if table else name


def setting_name(path: Sequence[str | int]) -> str:
    """Return a setting's name: "training.steps", or "ladder[1]" for the second entry of a list."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _allowed(mistake: ErrorDetails) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "value_error":  # ours: it names the settings itself
        return str(context["error"])
    if kind == "string_pattern_mismatch" and NAME in context["pattern"]:
        return "must be 1 to 63 small letters, digits and inner dashes"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    return RULES.get(kind, mistake["msg"]).format_map(context)


def _instead(mistake: ErrorDetails) -> str:
    """Return ", not 0" where the value is a single one; a list or table is not repeated."""
    value: Any = mistake["input"]
    if mistake["type"] not in RULES.keys() | {"string_pattern_mismatch"}:
        return ""
    if not isinstance(value, str | int | float):
        return ""
    return f", not {shown(value)}"


def shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=not str(value).isprintable())
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
