"""A conversation keeps room for answers, and Ctrl-C stops one answer; what is ignored is refused.

No model: the next token is the same always, and each step takes as long as the test says.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.chat.generate import Reading, chooser
from edge_client.chat.speaker import Speaker
from edge_client.chat.talk import talk
from edge_client.errors import DataError
from protocol.cli import run_command

GREEDY = chooser(0, 1, None)
A = ord("a")


class Slow:
    """Say "a" for ever, a step after `step_s`."""

    def __init__(self, step_s: float = 0) -> None:
        self.step_s = step_s

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        time.sleep(self.step_s)
        return np.eye(256, dtype=np.float32)[A]

    def keep(self, length: int) -> None:
        pass


class Letters:
    """Have a token for each byte, and a chat template that writes turns with a sign before each."""

    chat_template = "there is one"
    bos_token_id = None

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> dict[str, list[int]]:
        said = "".join(f"{turn['role'][0]}{turn['content']}" for turn in turns)
        return {"input_ids": list(said.encode())}


def speaker(window: int | None, step_s: float = 0) -> Speaker:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    return Speaker(Reading(Slow(step_s)), Letters(), decode, frozenset(), window, "it")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_old_turns_go_before_the_answer_has_no_room() -> None:
    turns = [turn("user", "x" * 29), turn("assistant", "y" * 29), turn("user", "z" * 29)]
    assert len(speaker(120).prompt(turns, 30)) == 90  # 30 are left
    assert len(speaker(119).prompt(turns, 29)) == 90
    assert bytes(speaker(118).prompt(turns, 30)) == b"u" + b"z" * 29  # the oldest two are left out
    assert len(speaker(118).prompt(turns, 1000)) == 30
    assert len(speaker(91).prompt(turns, 1)) == 90
    assert len(speaker(None).prompt(turns, 1000)) == 90


def test_a_text_that_leaves_too_little_room_is_refused_with_the_numbers() -> None:
    said = "the text has 91 tokens, and 25 are kept for its answer: .* 100 in all; give it 16 less"
    with pytest.raises(DataError, match=said):
        talk(speaker(100), "x" * 90, GREEDY, 256)


@pytest.mark.parametrize(("most", "is_cut"), [(39, False), (40, False), (41, True)])
def test_an_answer_that_fills_the_window_is_said_to_be_cut(
    most: int, is_cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(speaker(100), "x" * 59, GREEDY, most)
    out, err = capsys.readouterr()
    assert out == "a" * min(most, 40) + "\n"
    cut = (
        "the answer was cut: with the 60 tokens before it, it fills the 100 that the model takes\n"
    )
    assert err == (cut if is_cut else "")


# -- Ctrl-C ----------------------------------------------------------------------------------------


def serve(prompt: str | None) -> None:
    """Talk as the command does, with a model that never ends."""
    run_command(lambda: talk(speaker(None, 0.02), prompt, GREEDY, 100_000))


def started(prompt: str | None, **streams: int) -> subprocess.Popen[bytes]:
    code = f"from tests.edge_client.chat.test_talk import serve; serve({prompt!r})"
    surroundings = os.environ | {"PYTHONPATH": str(Path.cwd()), "TERM": "dumb"}
    return subprocess.Popen([sys.executable, "-c", code], env=surroundings, **streams)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("last", "status"), [(b"\x04", 0), (b"\x03", 130)])
def test_ctrl_c_stops_the_answer_alone_and_at_the_prompt_ends(last: bytes, status: int) -> None:
    master, slave = pty.openpty()
    process = started(None, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    for _ in range(2):
        read_until(master, b"> ")
        os.write(master, b"the cat\n")
        read_until(master, b"aaaaa")
        process.send_signal(signal.SIGINT)
    read_until(master, b"> ")
    if last == b"\x04":
        os.write(master, last)
    else:
        interrupt(process)
    assert process.wait(180) == status
    os.close(master)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("prompt", ["the cat", None])
def test_ctrl_c_ends_an_answer_to_what_is_given(prompt: str | None) -> None:
    pipe = subprocess.PIPE
    process = started(prompt, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"the cat")
    process.stdin.close()
    process.stdin = None
    assert process.stdout.read(1) == b"a"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 130
    assert said.decode().splitlines()[-1] == "ended by SIGINT"


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C till it is heeded: between a prompt and the read behind it Python heeds none."""
    for _ in range(60):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
            return


def read_until(master: int, sign: bytes, seconds: float = 120) -> bytes:
    """Read a terminal until a sign comes."""
    said, deadline = b"", time.monotonic() + seconds
    while sign not in said:
        assert time.monotonic() < deadline, said
        said += os.read(master, 1000)
    return said
