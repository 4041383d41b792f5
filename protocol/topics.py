"""The table of topics: who publishes what where. asyncapi.yaml documents it; a test compares them.

Levels in braces are fields. `match` reads a topic from the broker back into its kind and fields,
so that no other module takes topics apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from protocol import VERSION
from protocol.errors import MalformedMessage, UnsupportedVersion

Party = Literal["aggregator", "device"]


class Topic(NamedTuple):
    """Describe one row of the table."""

    pattern: str
    publisher: Party
    retained: bool
    payload: str


ROOT = f"tunefleet/{VERSION}/{{job}}"
TABLE: Mapping[str, Topic] = {
    "job": Topic(f"{ROOT}/job", "aggregator", True, "Job"),
    "round": Topic(f"{ROOT}/round", "aggregator", True, "Round"),
    "global_manifest": Topic(
        f"{ROOT}/global/{{version}}/manifest", "aggregator", True, "GlobalManifest"
    ),
    "global_chunk": Topic(
        f"{ROOT}/global/{{version}}/{{band}}/{{index}}", "aggregator", True, "chunk"
    ),
    "candidate_manifest": Topic(
        f"{ROOT}/candidate/{{version}}/{{number}}/manifest", "aggregator", True, "GlobalManifest"
    ),
    "candidate_chunk": Topic(
        f"{ROOT}/candidate/{{version}}/{{number}}/{{band}}/{{index}}", "aggregator", True, "chunk"
    ),
    "onnx_manifest": Topic(f"{ROOT}/onnx/manifest", "aggregator", True, "ArtifactManifest"),
    "onnx_chunk": Topic(
        f"{ROOT}/onnx/{{artifact}}/{{file}}/{{index}}", "aggregator", True, "chunk"
    ),
    "status": Topic(f"{ROOT}/d/{{device}}/status", "device", True, "Status"),
    "upload_manifest": Topic(
        f"{ROOT}/d/{{device}}/up/{{upload}}/manifest", "device", False, "UploadManifest"
    ),
    "upload_chunk": Topic(f"{ROOT}/d/{{device}}/up/{{upload}}/{{index}}", "device", False, "chunk"),
    "control": Topic(f"{ROOT}/d/{{device}}/ctl", "aggregator", False, "Control"),
    "personal_manifest": Topic(
        f"{ROOT}/d/{{device}}/global/{{version}}/manifest", "aggregator", True, "GlobalManifest"
    ),
    "personal_chunk": Topic(
        f"{ROOT}/d/{{device}}/global/{{version}}/{{band}}/{{index}}", "aggregator", True, "chunk"
    ),
    "trial_manifest": Topic(
        f"{ROOT}/d/{{device}}/trial/{{version}}/manifest", "aggregator", True, "GlobalManifest"
    ),
    "trial_chunk": Topic(
        f"{ROOT}/d/{{device}}/trial/{{version}}/{{band}}/{{index}}", "aggregator", True, "chunk"
    ),
}
"""Kind → topic. Everything travels with QoS 1."""

NAME = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
"""Jobs and devices: 1–63 small letters, digits and inner dashes, as in a host name."""

_FIELDS = {
    "job": NAME,
    "device": NAME,
    "version": r"\d{1,9}",
    "number": r"\d{1,2}",
    "band": r"\d{1,5}-\d{1,5}",
    "index": r"\d{1,4}",
    "upload": r"[0-9a-f]{32}",
    "artifact": r"[0-9a-f]{32}",
    "file": r"[a-z]{1,16}\.[a-z]{1,16}",
}


class Match(NamedTuple):
    """Hold a topic's kind and its fields."""

    kind: str
    fields: Mapping[str, str]


def topic(kind: str, **fields: object) -> str:
    """Return the topic of a kind with all its fields filled in."""
    filled = TABLE[kind].pattern.format(**fields)
    if not _COMPILED[kind].fullmatch(filled):
        raise ValueError(f"{filled!r} is not a {kind} topic; names are small letters, digits, '-'")
    return filled


def subscription(kind: str, **fields: object) -> str:
    """Return the topic filter of a kind: fields not given match anything."""
    known = {name: fields.get(name, "+") for name in _FIELDS}
    return TABLE[kind].pattern.format(**known)


@lru_cache(maxsize=256)
def match(name: str) -> Match:
    """Read a topic.

    Raises:
        UnsupportedVersion: it belongs to another major version of the protocol.
        MalformedMessage: it is in no row of the table.
    """
    for kind, pattern in _COMPILED.items():
        if found := pattern.fullmatch(name):
            return Match(kind, found.groupdict())
    root, _, rest = name.partition("/")
    version = rest.partition("/")[0]
    if root == "tunefleet" and version != str(VERSION):
        raise UnsupportedVersion(version, VERSION)
    raise MalformedMessage(name, "no such topic in this protocol")


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(
        re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", pattern),
        re.ASCII,  # other scripts' digits would name the same number twice
    )


_COMPILED = {kind: _compile(row.pattern) for kind, row in TABLE.items()}
