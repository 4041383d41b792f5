"""Say in JSON Schema what the lines of a trace may hold; made from what the reader goes by.

`python -m device_profiles.traces.json_schema` writes it anew after the format has changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from device_profiles.traces.format import FORMAT, MAX_TEXT, TEXTS, VERSION
from device_profiles.traces.sample import FIELDS, POWER_SOURCES, TIME, Field

FILE = Path(__file__).with_name("trace.schema.json")


def trace_schema() -> dict[str, Any]:
    """Return the schema of one line: the header, which is the first, or a sample."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of a Tunefleet device trace",
        "description": "The first line is a header, each further one a sample, in ascending t. A "
        "field that a sample leaves out is as in the sample before; null is unknown.",
        "oneOf": [{"$ref": "#/$defs/header"}, {"$ref": "#/$defs/sample"}],
        "$defs": {"header": _header(), "sample": _sample()},
    }


def _header() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
    texts = {
        name: text | {"type": ["string", "null"]} if nullable else text
        for name, nullable in TEXTS.items()
    }
    return {
        "type": "object",
        "properties": {"format": {"const": FORMAT}, "version": {"const": VERSION}, **texts},
        "required": ["format", "version", *(name for name, null in TEXTS.items() if not null)],
        "additionalProperties": False,
    }


def _sample() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {field.name: _field(field) for field in (TIME, *FIELDS)},
        "required": [TIME.name],
        "additionalProperties": False,
    }


def _field(field: Field) -> dict[str, Any]:
    found: dict[str, Any] = {"description": field.says}
    if field.kind == "power":
        return found | {"enum": [*POWER_SOURCES, None]}
    json_type = "number" if field.kind == "number" else "boolean"
    found["type"] = [json_type, "null"] if field.nullable else json_type
    if field.kind == "number":
        found |= {"minimum": field.least, "maximum": field.most}
    return found


def schema_text() -> str:
    """Return the file that comes with the package."""
    return json.dumps(trace_schema(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(schema_text(), encoding="utf-8")
