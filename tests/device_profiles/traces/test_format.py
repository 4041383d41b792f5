"""Traces are read as they were written; what is wrong in one is named by file, line and field."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import TraceError
from device_profiles.traces.format import (
    MAX_LINE_BYTES,
    Sample,
    TornLine,
    Trace,
    read_trace,
    read_traces,
    write_trace,
)
from device_profiles.traces.json_schema import FILE, schema_text, trace_schema
from device_profiles.traces.sample import FIELDS, TIME

HEADER = (
    '{"format": "tunefleet-trace", "version": 1, "name": "pi", "profile": "raspberry-pi-5-8gb", '
    '"source": "made up", "licence": "CC0-1.0"}\n'
)


def write(folder: Path, text: str | bytes, name: str = "pi.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def trace_of(*samples: Sample, name: str = "pi") -> Trace:
    return Trace(name, None, None, None, samples)


def maybe(values: st.SearchStrategy[float]) -> st.SearchStrategy[float | None]:
    return st.none() | values


SHARE = st.floats(0, 1)
SAMPLES = st.lists(
    st.builds(
        Sample,
        t=st.floats(0, 1e6),
        online=st.booleans(),
        power=st.sampled_from(["mains", "battery", "unknown"]),
        battery_percent=maybe(st.floats(0, 100)),
        temperature_c=maybe(st.floats(-60, 200)),
        throttled=st.none() | st.booleans(),
        memory_available_mib=maybe(st.floats(0, 1e6)),
        cpu_load=maybe(SHARE),
        down_mbit=maybe(st.floats(0, 1e4)),
        up_mbit=maybe(st.floats(0, 1e4)),
        metered=st.none() | st.booleans(),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda sample: sample.t,
).map(lambda samples: sorted(samples, key=lambda sample: sample.t))


@given(SAMPLES)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]
) -> None:
    path = tmp_path_factory.mktemp("traces") / "any.jsonl"
    trace = Trace("any", "laptop-16gb", "somewhere", "CC0-1.0", samples)
    write_trace(path, trace)
    found = read_trace(path)
    assert found == trace
    assert list(found.samples) == samples
    written = path.read_bytes()
    write_trace(path, found)
    assert path.read_bytes() == written


def test_a_field_left_out_is_as_before_and_null_is_unknown(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER
        + '{"t": 0, "power": "battery", "battery_percent": 80, "down_mbit": 5.5}\n'
        + '{"t": 2, "battery_percent": null}\n'
        + '{"t": 3.5, "online": false, "power": null}\n',
    )
    trace = read_trace(path)
    first = Sample(0, power="battery", battery_percent=80, down_mbit=5.5)
    second = replace(first, t=2, battery_percent=None)
    assert list(trace.samples) == [
        first,
        second,
        replace(second, t=3.5, online=False, power="unknown"),
    ]
    assert (trace.name, trace.profile, trace.source) == ("pi", "raspberry-pi-5-8gb", "made up")


def test_at_is_a_step_function_that_holds_or_wraps() -> None:
    trace = trace_of(Sample(1, cpu_load=0.1), Sample(2, cpu_load=0.2), Sample(5, cpu_load=0.5))
    loads = {0.0: 0.1, 1.0: 0.1, 1.99: 0.1, 2.0: 0.2, 4.9: 0.2, 5.0: 0.5, 1e9: 0.5}
    assert {t: trace.at(t).cpu_load for t in loads} == loads
    assert trace.duration_s == 5
    assert trace.looped(4.9) == trace.at(4.9)
    assert trace.looped(5.0) == trace.at(0)  # the end is the beginning again
    assert trace.looped(12.5) == trace.at(2.5)
    changes = [trace.looped_change(t) for t in (0, 1, 1.5, 2, 4, 5, 9)]
    assert changes == pytest.approx([1, 2, 2, 5, 5, 6, 10])


def test_a_looped_trace_goes_on_from_change_to_change_without_end() -> None:
    """As in a replay, where times are sums of floats: 7323.4 - 7200 is less than 123.4."""
    times = [0.0, *(round(123.4 + 71.7 * i, 1) for i in range(98)), 7200.0]
    flags = [number % 3 == 0 for number in range(len(times))]
    trace = trace_of(*(Sample(t, online=on) for t, on in zip(times, flags, strict=True)))
    for offset in (0.0, 1 / 3, 4711.11):
        t = offset
        turns = 0
        while t < offset + 100 * 7200:
            now = trace.looped(t).online
            after = trace.looped_change(t, "online")
            assert after is not None and t < after < t + 300
            assert trace.looped(after).online != now == trace.looped((t + after) / 2).online
            t, turns = after, turns + 1
        assert turns == pytest.approx(100 * 66, abs=2)


def test_a_flag_that_never_turns_has_no_change() -> None:
    trace = trace_of(Sample(0), Sample(1, cpu_load=0.5), Sample(2, online=False))
    assert trace.looped_change(0.5, "online") is None, "its end is its beginning"
    assert trace.looped_change(0.5) == pytest.approx(1)


def test_a_trace_of_one_moment_is_always_so() -> None:
    trace = trace_of(Sample(0, cpu_load=0.3))
    assert trace.looped(17) == trace.at(17) == trace.samples[0]
    assert trace.looped_change(17) is None and trace.looped_change(17, "online") is None


def test_times_of_a_made_trace_ascend() -> None:
    with pytest.raises(ValueError, match="ascend"):
        trace_of(Sample(1), Sample(1))
    with pytest.raises(ValueError, match="at least one"):
        trace_of()


@pytest.mark.parametrize("torn", ['{"t": 2, "cpu', "\0\0\0\0", "{", '{"t": 2, "metered": nul'])
def test_a_torn_last_line_is_told_and_left_out(tmp_path: Path, torn: str) -> None:
    path = write(tmp_path, HEADER + '{"t": 0}\n{"t": 1, "cpu_load": 0.5}\n' + torn)
    told: list[str] = []
    trace = read_trace(path, warn=told.append)
    assert [sample.t for sample in trace.samples] == [0, 1]
    assert told == [f"{path}: line 4, its last, is not whole and was left out"]
    with pytest.warns(TornLine, match="line 4"):
        read_trace(path)


def test_a_last_line_without_its_end_is_read(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path, HEADER + '{"t": 0}\n{"t": 1}')).samples) == 2


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        ('{"t": 1, "power": "sun"}', "power", '"mains", "battery", "unknown", or null'),
        ('{"t": 1, "online": null}', "online", "true or false"),
        ('{"t": 1, "online": 1}', "online", "true or false"),
        ('{"t": 1, "battery_percent": 100.1}', "battery_percent", "a number from 0 to 100"),
        ('{"t": 1, "battery_percent": true}', "battery_percent", "a number from 0 to 100"),
        ('{"t": 1, "temperature_c": NaN}', "temperature_c", "a number from -60 to 200"),
        ('{"t": 1, "down_mbit": Infinity}', "down_mbit", "a number from 0 to 1e+06"),
        ('{"t": 1, "up_mbit": -1}', "up_mbit", "a number from 0"),
        ('{"t": 1, "cpu_load": "0.5"}', "cpu_load", "a number from 0 to 1"),
        ('{"t": 1, "memory_available_mib": 1' + "0" * 400 + "}", "memory_available_mib", "number"),
        ('{"t": 1, "memory_mib": 3}', "memory_mib", "allowed are t, online"),
        ('{"t": 0}', "t", "later than the sample before, 0"),
        ('{"t": null}', "t", "a number from 0"),
        ('{"online": true}', "t", "is missing"),
    ],
)
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_wrong_field_is_named_with_its_line(
    tmp_path: Path, line: str, field: str, said: str, end: str
) -> None:
    path = write(tmp_path, HEADER + '{"t": 0}\n' + line + end)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"trace {path}, line 3: field '{field}': ")
    assert said in str(caught.value)
    assert (caught.value.line, caught.value.field) == (3, field)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "is no object"),
        ("[" * (MAX_LINE_BYTES - 1), "is not JSON"),
        ('{"t": ' + "1" * 9000 + "}", "JSON"),
        ("[" * MAX_LINE_BYTES, "at most"),
        ('{"t": 1, "\udcff": 2}', "JSON"),
    ],
)
def test_a_line_that_is_no_sample_is_refused(tmp_path: Path, line: str, said: str) -> None:
    raw = (HEADER + '{"t": 0}\n' + line + '\n{"t": 2}\n').encode("utf-8", "surrogateescape")
    path = write(tmp_path, raw)
    with pytest.raises(TraceError, match=said) as caught:
        read_trace(path)
    assert caught.value.line == 3


def test_a_line_without_end_is_not_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + '{"t": 0}\n' + " " * 30_000_000)
    tracemalloc.start()
    with pytest.raises(TraceError, match="at most"):
        read_trace(path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("tunefleet-trace", "other", "format"),
        ('"version": 1', '"version": 2', "version"),
        ('"version": 1', '"version": true', "version"),
        ('"name": "pi", ', "", "name"),
        ('"name": "pi"', '"name": ""', "name"),
        ('"name": "pi"', '"name": "a\\nb"', "name"),
        ('"name": "pi"', '"name": "' + "n" * 1001 + '"', "name"),
        ('"made up"', "7", "source"),
        ('"source"', '"sauce"', "sauce"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, old: str, new: str, field: str) -> None:
    assert old in HEADER
    path = write(tmp_path, HEADER.replace(old, new) + '{"t": 0}\n')
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert (caught.value.line, caught.value.field) == (1, field)


@pytest.mark.parametrize("text", ["", HEADER, HEADER[:30]])
def test_a_file_without_samples_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TraceError, match=r"pi\.jsonl"):
        read_trace(write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"gone\.jsonl: can't be read"):
        read_trace(tmp_path / "gone.jsonl")
    with pytest.raises(TraceError, match="no trace"):
        read_traces(tmp_path)


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    for file, name in (("1", "zero"), ("2", "apple")):
        write_trace(tmp_path / f"{file}.jsonl", trace_of(Sample(0), name=name))
    assert [trace.name for trace in read_traces(tmp_path)] == ["apple", "zero"]
    assert [trace.name for trace in read_traces(tmp_path / "1.jsonl")] == ["zero"]
    write_trace(tmp_path / "3.jsonl", trace_of(Sample(0), name="zero"))
    with pytest.raises(TraceError, match=r"'zero' is that of 1\.jsonl too"):
        read_traces(tmp_path)


def test_ten_thousand_traces_are_kept_cheaply(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(50):
        samples = [
            Sample(60.0 * i, power="mains", down_mbit=draw.random(), battery_percent=draw.random())
            for i in range(300)
        ]
        write_trace(tmp_path / f"{number}.jsonl", trace_of(*samples, name=f"{number}"))
    tracemalloc.start()
    traces = read_traces(tmp_path)
    kept_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(traces) == 50
    assert kept_bytes / len(traces) < 10_000  # of which 4,800 are two columns of numbers


def test_the_schema_that_ships_is_the_readers() -> None:
    assert FILE.read_text(encoding="utf-8") == schema_text()
    sample = trace_schema()["$defs"]["sample"]["properties"]
    assert [*sample] == ["t", *(field.name for field in FIELDS)]
    assert [*sample] == [*Sample.__dataclass_fields__]
    for field in (TIME, *FIELDS):  # a bound of the schema is the reader's own
        if field.kind == "number":
            for bound in (sample[field.name]["minimum"], sample[field.name]["maximum"]):
                assert field.take(bound) == bound
            with pytest.raises(ValueError, match="a number"):
                field.take(sample[field.name]["maximum"] + 1)


DOCS = Path(__file__).parents[3] / "docs" / "traces.md"


def test_the_trace_in_the_docs_is_one(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    trace = read_trace(write(tmp_path, example))
    assert trace.at(1.9).cpu_load == 0.31 and not trace.at(3).online
    header = trace_schema()["$defs"]["header"]["properties"]
    assert set(json.loads(example.splitlines()[0])) == set(header)
    for name in ("t", *(field.name for field in FIELDS), *header):
        assert f"`{name}`" in text
