"""A conversation at a terminal, or one answer to what is given."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from edge_client.chat.generate import Choose, Reading
from edge_client.chat.speaker import Speaker
from edge_client.chat.text import Turn
from edge_client.errors import DataError
from protocol.cli import Interrupted


def talk(speaker: Speaker, prompt: str | None, choose: Choose, max_tokens: int) -> None:
    """Answer `prompt`; without one what is typed, line by line, or all of standard input at once.

    Raises:
        DataError: there is nothing to answer, or too much.
    """
    if not speaker.has_template:
        print("this model has no chat template: it continues the text", file=sys.stderr)
    if prompt is None and sys.stdin.isatty():
        _converse(speaker, choose, max_tokens)
        return
    text = _standard_input() if prompt is None else prompt
    if not text.strip():
        raise DataError("there is nothing to answer: the text is empty")
    _answer(speaker, [_turn("user", text)], choose, max_tokens)


def _converse(speaker: Speaker, choose: Choose, max_tokens: int) -> None:
    """Answer lines until there are no more (Ctrl-D); Ctrl-C stops an answer, or ends at a line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    turns: list[Turn] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except Interrupted:
            print()
            raise
        if not line.strip():
            continue
        if not speaker.has_template:
            turns.clear()  # each text is continued by itself
        turns.append(_turn("user", line))
        text = ""
        try:
            with _stoppable(speaker.reading):
                text = _answer(speaker, turns, choose, max_tokens)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
        if text:
            turns.append(_turn("assistant", text))
        else:
            turns.pop()


@contextlib.contextmanager
def _stoppable(reading: Reading) -> Iterator[None]:
    """Let Ctrl-C stop what is being answered, between two steps, and nothing else."""

    def stop(*_: object) -> None:
        reading.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        reading.stopped = False


def _answer(speaker: Speaker, turns: list[Turn], choose: Choose, max_tokens: int) -> str:
    """Show the answer as it comes, with a line's end after it, and return it."""
    ids = speaker.prompt(turns, max_tokens)
    try:
        found = speaker.answer(ids, choose, max_tokens, _show)
    finally:
        with contextlib.suppress(BrokenPipeError):
            print(flush=True)
    if found.is_cut:
        print(
            f"the answer was cut: with the {len(ids)} tokens before it, it fills the "
            f"{speaker.context_tokens} that the model takes",
            file=sys.stderr,
        )
    return found.text


def _show(piece: str) -> None:
    """Write a piece of an answer; a terminal is not given signs that would steer it."""
    if sys.stdout.isatty():
        piece = "".join(sign for sign in piece if sign.isprintable() or sign in "\n\t")
    print(piece, end="", flush=True)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"what standard input gives is not text in UTF-8 ({error.reason})"
        ) from None


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
