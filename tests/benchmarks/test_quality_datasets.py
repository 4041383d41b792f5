"""Devices cut from a folder of rows."""

import json
from pathlib import Path

import pytest

from benchmarks.quality.datasets import RANKS, read_devices, read_domains
from edge_client.errors import DataError

DOMAINS = ("de", "es", "fr", "it")


def rows(domains=DOMAINS, count: int = 20, split: str = "train") -> list[dict[str, str]]:
    return [
        {"text": f"{split} {domain} number {n}", "domain": domain, "id": "x"}
        for domain in domains
        for n in range(count)
    ]


def folder_of(tmp_path: Path, train: list, test: list) -> Path:
    folder = tmp_path / "datasets" / "made"
    folder.mkdir(parents=True)
    for name, found in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in found))
    return tmp_path


def texts(devices) -> list[list[str]]:
    return [
        [example.payload for example in part]
        for device in devices
        for part in (device.splits.train, device.splits.trust, device.splits.held_out)
    ]


def test_eight_devices_share_no_text(tmp_path):
    folder = folder_of(tmp_path, rows(), rows(split="test"))
    devices = read_devices(folder, "made", seed=0)
    assert [device.rank for device in devices] == list(RANKS)
    found = [text for part in texts(devices) for text in part]
    assert len(found) == len(set(found)) == 2 * 4 * 20
    for device in devices:
        domain = device.name.split("-")[0]
        assert all(f" {domain} " in e.payload for e in device.splits.train)
        assert all(e.payload.startswith("test") for e in device.splits.held_out)


def test_the_seed_decides(tmp_path):
    folder = folder_of(tmp_path, rows(), rows(split="test"))
    first, again, other = (texts(read_devices(folder, "made", seed=s)) for s in (0, 0, 1))
    assert first == again != other


def test_test_text_that_is_also_trained_on_is_left_out(tmp_path):
    train = rows()
    folder = folder_of(tmp_path, train, [*rows(split="test"), *train[:5]])
    held_out = [e.payload for d in read_devices(folder, "made", seed=0) for e in d.splits.held_out]
    assert not {row["text"] for row in train} & set(held_out)


def test_instructions_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "2+2?", "response": "4", "domain": "sums"}))
    assert read_domains(file)["sums"][0].kind == "completion"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "no domain"}', "rows.jsonl:1: it has no 'domain', a string"),
        ('{"domain": "de"}', "rows.jsonl:1: it has neither"),
        ("{", "rows.jsonl:1: not JSON"),
        ("[]", "rows.jsonl:1: a row is an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, told):
    file = tmp_path / "rows.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=r".") as error:
        read_domains(file)
    assert told in str(error.value)


def test_too_few_domains(tmp_path):
    folder = folder_of(tmp_path, rows(DOMAINS[:2]), rows(split="test"))
    with pytest.raises(DataError, match="4 domains with rows in both"):
        read_devices(folder, "made", seed=0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_devices(tmp_path, "made", seed=0)
