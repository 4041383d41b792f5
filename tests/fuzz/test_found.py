"""What mutated bytes have brought to light, each as the smallest input that shows it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from aggregator.config import read_job
from aggregator.enrol.ca import read_request
from aggregator.errors import ConfigError, EnrolmentRefused
from protocol.bands import parse_band
from protocol.errors import MalformedMessage, ProtocolError, UnsupportedVersion
from protocol.events import EventLog
from protocol.messages import UploadManifest
from protocol.signing import SigningKey, open_message
from protocol.tensors import encode
from tests.aggregator.uploading import Aggregator, make_job, update
from tests.fuzz import corpus
from tests.fuzz.feeding import Parser, traced
from tests.fuzz.parsers import as_pem


def test_a_dtype_that_is_no_unicode_is_refused_and_the_intake_goes_on(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path, make_job())
    aggregator.greet()
    good = encode(update(aggregator.job), "f32")
    size = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + size].replace(b'"F32"', b'"\\ud800"', 1)
    bad = len(header).to_bytes(8, "little") + header + good[8 + size :]
    (answer,) = aggregator.deliver(aggregator.manifest(bad), bad)
    assert answer.kind == "reject" and "'\\ud800'" in answer.reason
    (answer,) = aggregator.deliver(aggregator.manifest(good), good)
    assert answer.kind == "done"
    aggregator.store.close()


def test_thousands_of_bad_metrics_are_refused_at_once() -> None:
    body = json.loads(corpus.manifest(b"x").model_dump_json())
    body["metrics"] = {f"{i:x}": [] for i in range(35_000)}
    key = SigningKey.generate()
    sealed = corpus.seal(key, json.dumps(body, separators=(",", ":")).encode(), "t")

    def opened(data: bytes) -> None:
        open_message(data, "t", UploadManifest)

    with traced():
        Parser("metrics", [sealed], opened).run(0)
    with pytest.raises(MalformedMessage, match="35000 entries"):
        opened(sealed)


@pytest.mark.parametrize("name", ["٣-٤", "0-" + "9" * 5000, "0-100000", "²-³", "0-2\n"])
def test_a_band_has_one_name_and_no_other(name: str) -> None:
    with pytest.raises(ProtocolError, match="not a rank band"):
        parse_band(name)


@pytest.mark.parametrize("theirs", ["\ud800", "\x1b[2J\n", "9" * 10_000, [[["x"] * 99] * 99] * 99])
def test_a_strange_version_is_shown_in_short(theirs: object) -> None:
    shown = str(UnsupportedVersion(theirs, 1))
    assert shown.isprintable() and len(shown) < 300


def test_a_log_for_people_has_one_line_an_event_whatever_a_peer_said() -> None:
    stream = io.StringIO()
    log = EventLog(as_json=False, stream=stream)
    log.emit("refused", reason="a\n12:00:00 counted \x1b[2J\ud800 é")
    assert stream.getvalue().count("\n") == 1
    assert "a\\n12:00:00 counted \\x1b[2J\\ud800 é\n" in stream.getvalue()


def test_a_certificate_request_of_another_version_is_refused() -> None:
    der = bytearray(corpus.requests()[0])
    der[der.index(b"\x02\x01\x00") + 2] = 1
    with pytest.raises(EnrolmentRefused, match="version"):
        read_request(as_pem(bytes(der)))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ('model = "a\\u0000.json"', "not the name of a model"),
        ('model = "a\\u0000b"', "not the name of a model"),
        ("policy.quarantine_s = inf", "policy.quarantine_s"),
        ("policy.quarantine_s = 1e300", "policy.quarantine_s"),
        ("policy.quarantine_after = 10000000000000000000", "policy.quarantine_after"),
    ],
)
def test_settings_that_would_stop_the_aggregator_later_are_refused(
    tmp_path: Path, setting: str, why: str
) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'job = "notes"\n{setting}\n')
    with pytest.raises(ConfigError, match=why):
        read_job(path)


def test_a_model_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{"job": "notes", "model": "\\ud800.json"}')
    with pytest.raises(ConfigError, match="not the name of a model"):
        read_job(path)
