"""What reads traces and others' recordings: files that somebody was sent."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

from device_profiles.traces.format import read_trace, write_trace
from device_profiles.traces.imports.read import read_recordings
from tests.fuzz.feeding import Parser

TRACE = (
    b'{"format": "tunefleet-trace", "version": 1, "name": "pi", "profile": null, '
    b'"source": "made up", "licence": null}\n'
    b'{"t": 0, "power": "battery", "battery_percent": 80, "down_mbit": 5.5, "online": false}\n'
    b'{"t": 2.5, "throttled": true, "metered": null, "cpu_load": 0.25}\n'
)
CLIENT = {"active": [1, 40], "inactive": [20, 60], "finish_time": 100, "model": "x", "duration": 9}
MESSAGES = "2020-01-28 06:00:00\twifi\n2020-01-28 07:00:00\t40.5%\n2020-01-28 08:00:00\t4G\n"
SAMPLES: dict[str, list[bytes]] = {
    "fedscale": [
        *(pickle.dumps({1: CLIENT, "b": CLIENT}, protocol=p) for p in range(6)),
        pickle.dumps({7: {"computation": 160.0, "communication": 5648.25}}),
    ],
    "flash": [json.dumps({"0": {"guid": "a", "messages": MESSAGES}}).encode()],
    "sbc-bench": [
        b"sbc-bench v0.9\nMem:  960Mi 116Mi 779Mi 2.0Mi 64Mi 826Mi\n"
        b"System health while running 7-zip:\n\nTime        fake/real   load %cpu\n"
        b"23:59:50: 1800/1400MHz  0.29  37%   0%  40.0\xc2\xb0C\n"
        b"00:00:10:  600/ 600MHz  0.91  16%   0%  60.5\xc2\xb0C\n"
    ],
    "bandwidth": [b"class,trace,t_s,mbit_s\nbus,one,0,4.0\nbus,one,1.5,2.5\n"],
}


def trace_parsers(folder: Path) -> list[Parser]:
    """Return a parser for traces and for each kind of recording."""
    folder.mkdir(parents=True, exist_ok=True)
    given, again = folder / "given", folder / "again.jsonl"

    def ignore(_: str) -> None:
        """Leave out a torn last line."""

    def parse_trace(data: bytes) -> None:
        given.write_bytes(data)
        trace = read_trace(given, warn=ignore)
        write_trace(again, trace)
        assert read_trace(again) == trace

    def recordings(kind: str) -> Callable[[bytes], None]:
        def parse(data: bytes) -> None:
            given.write_bytes(data)
            for trace in read_recordings(kind, [given]).traces:
                write_trace(again, trace)
                assert read_trace(again) == trace

        return parse

    kinds = [Parser(f"recordings: {kind}", s, recordings(kind)) for kind, s in SAMPLES.items()]
    return [Parser("traces", [TRACE], parse_trace), *kinds]
