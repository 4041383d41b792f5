"""What others recorded becomes traces; what can't is named, and a pickle runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from device_profiles.cli import app
from device_profiles.errors import TraceError
from device_profiles.traces.format import Sample, Trace, read_trace, read_traces
from device_profiles.traces.imports.bandwidth import import_bandwidth
from device_profiles.traces.imports.common import Names
from device_profiles.traces.imports.fedscale import import_fedscale
from device_profiles.traces.imports.flash import import_flash
from device_profiles.traces.imports.plain_pickle import NotPlain, load_plain
from device_profiles.traces.imports.sbc_bench import import_sbc_bench

BEHAVIOUR = {
    1: {
        "model": "made up",
        "duration": 1000,
        "active": [100, 400],
        "inactive": [250, 800],
        "finish_time": 1000,
    },
    2: {"model": "made up", "duration": 0, "active": [0], "inactive": [500], "finish_time": 600},
}
CAPACITY = {7: {"computation": 160.0, "communication": 5648.0}}


def pickled(folder: Path, name: str, value: object, protocol: int = 4) -> Path:
    path = folder / name
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def online(trace: Trace, *times: float) -> list[bool]:
    return [trace.at(t).online for t in times]


@pytest.mark.parametrize("protocol", range(6))
def test_fedscale_clients_are_there_in_turns(tmp_path: Path, protocol: int) -> None:
    behaviour = pickled(tmp_path, "client_behave_trace", BEHAVIOUR, protocol)
    capacity = pickled(tmp_path, "client_device_capacity", CAPACITY, protocol)
    found = import_fedscale([behaviour, capacity])
    assert not found.left_out
    first, second = found.traces
    assert online(first, 0, 99, 100, 249, 250, 399, 400, 799, 800, 999) == [
        *(False, False, True, True, False, False, True, True, False, False)
    ]
    assert first.duration_s == 1000
    assert online(first, 0) == [first.looped(1000).online]
    assert online(second, 0, 499, 500) == [True, True, False]
    assert first.at(0).down_mbit == first.at(0).up_mbit == 5.648
    assert first.at(0).power == "unknown" and first.at(0).cpu_load is None
    assert import_fedscale([behaviour]).traces[0].at(0).down_mbit is None
    (alone,) = import_fedscale([capacity]).traces
    assert alone.at(0).online and alone.at(0).down_mbit == 5.648


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"active": [5], "inactive": [3]}, "not in turn at 5 s"),
        ({"active": [1, 2], "inactive": [3, 4]}, "not in turn at 2 s"),
        ({"active": [], "inactive": []}, "not a list of times"),
        ({"active": ["1"], "inactive": [3]}, "no time in seconds"),
        ({"active": [True], "inactive": [3]}, "no time in seconds"),
        ({"active": [float("nan")], "inactive": [3]}, "no time in seconds"),
        ({"active": [10**400], "inactive": [3]}, "no time in seconds"),
        ({"active": [1], "inactive": [3], "finish_time": None}, "no time in seconds"),
    ],
)
def test_a_client_that_makes_no_sense_is_left_out_and_named(
    tmp_path: Path, fields: dict[str, object], said: str
) -> None:
    path = pickled(tmp_path, "behave", {"good": BEHAVIOUR[2], "bad": fields})
    found = import_fedscale([path])
    assert [trace.name for trace in found.traces] == ["fedscale-good"]
    (why,) = found.left_out
    assert why.startswith("behave: client bad: ") and said in why


def test_odd_client_ids_are_named_shortly(tmp_path: Path) -> None:
    ids = (10**12, 2.5, None, "../../etc", "é" * 90)
    path = pickled(tmp_path, "behave", dict.fromkeys(ids, BEHAVIOUR[2]))
    names = [trace.name.removeprefix("fedscale") for trace in import_fedscale([path]).traces]
    assert names == ["-1000000000000", "-float", "-nonetype", "-etc", ""]


def test_many_of_one_name_get_numbers_without_looking_at_all_of_them() -> None:
    names = Names()
    assert [names.of(text) for text in ("a", "a 2", "A!", "a")] == ["a", "a-2", "a-3", "a-4"]
    looked = [0]

    class Counting(set[str]):
        def __contains__(self, name: object) -> bool:
            looked[0] += 1
            return super().__contains__(name)

    names._taken = Counting()
    assert len({names.of("many") for _ in range(500)}) == 500
    assert looked[0] <= 1000


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 5))
def test_plain_values_are_read_as_python_reads_them(value: object, protocol: int) -> None:
    data = pickle.dumps([value, value], protocol=protocol)  # the second is a reference
    assert load_plain(data) == [value, value]
    assert load_plain(pickletools.optimize(data)) == [value, value]


def test_long_lists_and_dicts_are_read(tmp_path: Path) -> None:
    value = {number: [number] * 3 for number in range(5000)}
    assert all(load_plain(pickle.dumps(value, p)) == value for p in range(6))


class Hostile:
    """Would make a file if its pickle were loaded as Python's own reader loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    path = pickled(tmp_path, "evil", {1: Hostile(mark)}, protocol)
    pickle.loads(path.read_bytes())  # Python's own reader does run it
    mark.rmdir()
    with pytest.raises(TraceError, match=r"it names \w+\.mkdir; nothing in it was run"):
        import_fedscale([path])
    assert not mark.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cos\nsystem\n(S'exit 1'\ntR.",  # a name, called
        b"(S'exit 1'\nios\nsystem\n.",  # the old way to make an instance
        b"(cos\nsystem\nS'exit 1'\no.",
        b"\x80\x02cbuiltins\neval\n\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04\x93.",
        b"\x80\x02Pid\n.",  # a reference to what is not in it
        b"\x80\x02K\x01Q.",
        b"\x80\x02\x82\x01.",  # a registered extension
        b"\x80\x05\x97.",  # a buffer from elsewhere
        b"}(U\x01ab.",  # state for a dict
        b"",
        b".",
        b"(.",
        b"0.",
        b"e.",
        b"](K\x01K\x02u.",
        b"}(K\x01u.",  # a key without a value
        b"}(]K\x01u.",  # a list as a key
        b"}" + b")" + b"\x85" * 9 + b"K\x01s.",  # a nested tuple as a key
        b"g" + b"1" * 9000 + b"\n.",
        b"I" + b"1" * 9000 + b"\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes: 2**63 of them
        b"\x80\x05\x96\xff\xff\xff\xff\x0f\0\0\0.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # text of 2**63 bytes
        b"\x80\x02j\xff\xff\xff\xff.",
        b"not a pickle",
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "evil"
    path.write_bytes(raw)
    with pytest.raises(TraceError, match="evil: is not a pickle of plain"):
        import_fedscale([path])


def test_a_few_bytes_make_no_gigabytes() -> None:
    """Python's own reader would make a table for 2**32 values put aside."""
    tracemalloc.start()
    assert load_plain(b"\x80\x02K\x01r\xff\xff\xff\xff.") == 1
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_keys_that_all_have_one_hash_are_refused() -> None:
    one_hash = [number * (2**61 - 1) for number in range(1000)]
    with pytest.raises(NotPlain, match="over 64 bits as a key"):
        load_plain(pickle.dumps(dict.fromkeys(one_hash)))


def test_a_pickle_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    for value in ([1], {}, {1: 2}, {1: {"other": 3}}):
        with pytest.raises(TraceError, match="client"):
            import_fedscale([pickled(tmp_path, "other", value)])


FLASH = {
    "0": {
        "guid": "a",
        "model": "made up",
        "messages": "2020-01-28 06:00:00\twifi\n"
        "2020-01-28 06:00:00\t40.0%\n"
        "2020-01-28 07:00:00\tbattery_charged_on\n"
        "2020-01-28 07:30:00\tscreen_lock\n"
        "2020-01-28 08:00:00\t4G\n"
        "2020-01-28 08:10:00\tUnknown\n"
        "2020-01-29 00:00:00\tphone_off\n",
    },
    "1": {
        "guid": "b",
        "model": "made up",
        "messages": "2020-01-28 10:00:00\tbattery_charged_off\n2020-01-28 09:00:00\twifi\n",
    },
    "2": {"guid": "c", "model": "made up", "messages": "2020-01-28 10:00:00 wifi\n"},
    "3": {"guid": "d", "model": "made up"},
}


def test_flash_states_become_fields(tmp_path: Path) -> None:
    path = tmp_path / "state_traces.json"
    path.write_text(json.dumps(FLASH), encoding="utf-8")
    found = import_flash([path])
    hour = 3600.0
    first, second = found.traces
    assert first.at(0) == Sample(0.0, online=False)
    assert first.at(6 * hour) == Sample(6 * hour, battery_percent=40.0, metered=False)
    assert first.at(7.6 * hour).power == "mains"
    assert (first.at(8 * hour).online, first.at(8 * hour).metered) == (True, True)
    assert not first.at(8.2 * hour).online
    assert first.duration_s == 24 * hour
    assert (second.at(9.5 * hour).online, second.at(9.5 * hour).power) == (True, "unknown")
    assert second.at(10 * hour).power == "battery"  # told first, happened later
    assert [why.split(": ")[1] for why in found.left_out] == ["device 2", "device 3"]


@pytest.mark.parametrize("raw", [b"[1]", b"{}", b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_flash_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(raw)
    with pytest.raises(TraceError, match=r"other\.json"):
        import_flash([path])


SBC_BENCH = """sbc-bench v0.9.9 Made Up Board (Thu, 05 Jan 2023 05:33:36 +0000)

              total        used        free      shared  buff/cache   available
Mem:          960Mi       116Mi       779Mi       2.0Mi        64Mi       826Mi
Swap:         480Mi          0B       480Mi

System health while running tinymembench:

Time        big.LITTLE   load %cpu %sys %usr %nice %io %irq   Temp
23:59:50: 1800/1416MHz  0.29  37%   0%  37%   0%   0%   0%  40.0°C
00:00:10: 1800/1416MHz  0.91  16%   0%  16%   0%   0%   0%  60.5°C  1.31V

System health while running 7-zip multi core benchmark:

Time        big.LITTLE   load %cpu %sys %usr %nice %io %irq   Temp
00:01:50: 1200/1416MHz  4.60  98%   0%  33%   0%   0%   0%  85.0°C

##########################################################################

00:09:00: 1800/1416MHz  4.60  33%   0%  33%   0%   0%   0%  46.2°C
"""


def test_a_log_of_sbc_bench_is_a_board_under_load(tmp_path: Path) -> None:
    path = tmp_path / "Made_Up__1abC.txt"
    path.write_text(SBC_BENCH, encoding="utf-8")
    (trace,) = import_sbc_bench([path]).traces
    assert trace.name == "made-up-1abc"
    assert list(trace.samples) == [
        Sample(0.0, True, "mains", None, 40.0, False, 826.0, 0.37),
        Sample(20.0, True, "mains", None, 60.5, False, 826.0, 0.16),
        Sample(120.0, True, "mains", None, 85.0, True, 826.0, 0.98),
    ]


def test_the_real_clock_says_whether_a_pi_throttles(tmp_path: Path) -> None:
    path = tmp_path / "pi.txt"
    text = SBC_BENCH.replace("big.LITTLE ", "fake/real  ").replace("1200/1416MHz", "1800/ 600MHz")
    path.write_text(text.replace("/1416MHz", "/1800MHz"), encoding="utf-8")
    (trace,) = import_sbc_bench([path]).traces
    assert [sample.throttled for sample in trace.samples] == [False, False, True]


def test_a_log_without_health_is_left_out_and_another_file_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("sbc-bench v0.1\n", encoding="utf-8")
    assert import_sbc_bench([path]).left_out == ["log.txt: it has no lines of a board's health"]
    path.write_text("dear diary\n", encoding="utf-8")
    with pytest.raises(TraceError, match="no log of sbc-bench"):
        import_sbc_bench([path])


def test_throughput_becomes_a_link(tmp_path: Path) -> None:
    path = tmp_path / "bus.csv"
    path.write_text(
        "class,trace,t_s,mbit_s\nbus,one,10,4.0\nbus,one,11.5,2.5\nbus,two,0,1\nbus,two,2,0\n",
        encoding="utf-8",
    )
    one, two = import_bandwidth([path]).traces
    assert [(s.t, s.down_mbit, s.up_mbit) for s in one.samples] == [
        (0, 4.0, None),
        (1.5, 2.5, None),
    ]
    assert [trace.name for trace in (one, two)] == ["bus-one", "bus-two"]
    assert two.at(2).down_mbit == 0
    path.write_text("t_s,mbit_s\n0,1\n1,2\n", encoding="utf-8")
    assert [trace.name for trace in import_bandwidth([path]).traces] == ["bus"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time,mbit_s\n0,1\n", "no column t_s"),
        ("", "no column t_s and mbit_s"),
        ("t_s,mbit_s\n", "has no row"),
        ("t_s,mbit_s\n0,nan\n", "line 2: field 'mbit_s': must be a number"),
        ("t_s,mbit_s\n0,1\n1,-2\n", "line 3: field 'mbit_s'"),
        ("t_s,mbit_s\n0,1\n1\n", "line 3: field 'mbit_s'"),
        ("t_s,mbit_s\n" + "1" * 200_000 + ",1\n", "field"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=r"bad\.csv") as caught:
        import_bandwidth([path])
    assert said in str(caught.value)


def test_the_commands_write_traces_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "Made_Up__1abC.txt"
    path.write_text(SBC_BENCH, encoding="utf-8")
    out = tmp_path / "traces"
    ran = CliRunner().invoke(
        app, ["import", "sbc-bench", str(path), "--out", str(out), "--profile", "rockpro64-4gb"]
    )
    assert ran.exit_code == 0, ran.output
    (trace,) = read_traces(out)
    assert (trace.profile, trace.duration_s) == ("rockpro64-4gb", 120)
    again = CliRunner().invoke(app, ["import", "sbc-bench", str(path), "--out", str(out)])
    assert isinstance(again.exception, TraceError) and "new folder" in str(again.exception)
    command = ["import", "sbc-bench", str(path), "--out", str(tmp_path / "other")]
    named = CliRunner().invoke(app, [*command, "--profile", str(tmp_path / "mine.toml")])
    assert "names one that comes with the package: chromebook" in str(named.exception)
    made = tmp_path / "made"
    ran = CliRunner().invoke(
        app, ["traces", "--scenario", "thermal-throttle", "--devices", "3", "--out", str(made)]
    )
    assert ran.exit_code == 0, ran.output
    assert len(read_traces(made)) == 3
    assert (made / "policy.toml").read_text() == "temperature_below = 70\n"
    assert read_trace(made / "thermal-throttle-00000.jsonl").name == "thermal-throttle-00000"
    listed = CliRunner().invoke(app, ["traces"]).output
    assert "stale-devices" in listed and "must hold: rounds end without those" in listed
