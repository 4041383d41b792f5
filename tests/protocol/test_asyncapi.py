"""asyncapi.yaml and protocol.topics.TABLE are one table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import protocol
from protocol import messages
from protocol.topics import TABLE

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def document() -> Any:
    path = Path(protocol.__file__).with_name("asyncapi.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def resolved(document: Any, reference: dict[str, str]) -> Any:
    for part in reference["$ref"].removeprefix("#/").split("/"):
        document = document[part]
    return document


def test_its_version_is_that_of_the_protocol(document: Any) -> None:
    assert document["asyncapi"] == "3.0.0"
    assert document["info"]["version"].split(".")[0] == str(protocol.VERSION)


def test_its_channels_are_the_rows_of_the_table(document: Any) -> None:
    assert list(document["channels"]) == list(TABLE)


@pytest.mark.parametrize("kind", TABLE)
def test_a_channel_is_its_row(document: Any, kind: str) -> None:
    channel, row = document["channels"][kind], TABLE[kind]
    assert channel["address"] == row.pattern
    assert channel["x-publisher"] == row.publisher
    assert channel["x-retained"] is row.retained
    assert list(channel["messages"]) == [row.payload]
    assert list(channel["parameters"]) == re.findall(r"\{(\w+)\}", row.pattern)
    assert row.payload == "chunk" or hasattr(messages, row.payload)


@pytest.mark.parametrize("kind", TABLE)
def test_the_aggregator_sends_what_it_publishes(document: Any, kind: str) -> None:
    (action,) = (
        operation["action"]
        for operation in document["operations"].values()
        if operation["channel"]["$ref"] == f"#/channels/{kind}"
    )
    assert action == ("send" if TABLE[kind].publisher == "aggregator" else "receive")


def test_every_reference_leads_somewhere(document: Any) -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert resolved(document, node)
            for value in node.values():
                walk(value)

    walk(document)
