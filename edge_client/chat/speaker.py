"""A model that answers, opened: its decoder, its tokenizer, and where its answers end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from device_profiles.schema import DeviceProfile
from edge_client.chat.choose import Choice
from edge_client.chat.generate import Choose, Reading, Stopped, generate
from edge_client.chat.providers import candidates
from edge_client.chat.text import Growing, Turn, written
from edge_client.errors import DataError
from edge_client.exports.manifest import GRAPH

ROOM = 4
"""One part in so many of the model's window is kept for an answer, where it may be so long."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold what was answered."""

    text: str
    is_cut: bool
    """Whether it ended because the model's window was full."""


@dataclass(frozen=True, slots=True)
class Speaker:
    """Hold what is needed to answer."""

    reading: Reading
    tokenizer: Any
    decode: Callable[[list[int]], str]
    """Tokens → text, without special tokens."""
    stops: frozenset[int]
    context_tokens: int | None
    runs_on: str
    """The backend, and the provider where there are several."""
    notes: tuple[str, ...] = ()
    """What the owner should know of how it was opened."""

    @property
    def has_template(self) -> bool:
        """Say whether it answers turns of a conversation, and does not only continue text."""
        return bool(self.tokenizer.chat_template)

    def prompt(self, turns: Sequence[Turn], most: int) -> list[int]:
        """Return the tokens of a conversation, with room for an answer of `most` tokens after it.

        The room is at most a part of the model's window. The oldest turns are left out to make it.

        Raises:
            DataError: the last turn alone is too long, or is nothing.
            ConfigError: as `text.written`.
        """
        window = self.context_tokens
        room = 0 if window is None else max(1, min(most, window // ROOM))
        for start in range(0, len(turns), 2):
            ids = written(self.tokenizer, turns[start:])
            if window is None or len(ids) + room <= window:
                return ids
        raise DataError(
            f"the text has {len(ids)} tokens, and {room} are kept for its answer: the model takes "
            f"{window} in all; give it {len(ids) + room - (window or 0)} less"
        )

    def answer(
        self, prompt: Sequence[int], choose: Choose, most: int, show: Callable[[str], object]
    ) -> Answer:
        """Answer in at most `most` tokens; what comes is shown piece by piece, and returned."""
        room = most if self.context_tokens is None else self.context_tokens - len(prompt)
        growing, pieces = Growing(self.decode, prompt), []
        with suppress(Stopped):
            for token in generate(self.reading, prompt, choose, self.stops, min(most, room)):
                pieces.append(growing.push(token))
                show(pieces[-1])
        is_cut = not self.reading.stopped and len(pieces) == room < most
        pieces.append(growing.end())
        show(pieces[-1])
        return Answer("".join(pieces), is_cut)


def open_speaker(choice: Choice, profile: DeviceProfile, *, provider: str, threads: int) -> Speaker:
    """Open what was chosen, for `threads` threads; `provider` is the owner's, if not empty.

    Raises:
        ConfigError: there is no such provider.
        ModelError: it can't be opened.
    """
    opener = _open_onnx if choice.backend == "onnx" else _open_torch
    return opener(choice, profile, provider, threads)


def _open_onnx(choice: Choice, profile: DeviceProfile, provider: str, threads: int) -> Speaker:
    from edge_client.chat.onnx_model import OnnxDecoder
    from edge_client.data.plain_tokenizer import plain_tokenizer

    export = choice.export
    assert export is not None, "ONNX is exported"
    tried, missing = candidates(profile, provider)
    decoder = OnnxDecoder(choice.folder / GRAPH, tried, threads)
    tokenizer = plain_tokenizer(choice.folder, export)
    return Speaker(
        Reading(decoder),
        tokenizer,
        tokenizer.decode,
        frozenset(export.stop_tokens),
        export.context_tokens,
        f"ONNX Runtime ({export.kind}, {decoder.opened.provider})",
        (*missing, *decoder.opened.refused),
    )


def _open_torch(choice: Choice, profile: DeviceProfile, provider: str, threads: int) -> Speaker:
    from edge_client.chat.torch_model import TorchDecoder
    from edge_client.exports.merge import context_tokens, stop_tokens
    from edge_client.model import load_tokenizer

    tokenizer = load_tokenizer(choice.folder)
    decoder = TorchDecoder(choice.folder, choice.adapter, threads)
    return Speaker(
        Reading(decoder),
        tokenizer,
        partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        frozenset(stop_tokens(decoder.net, tokenizer)),
        context_tokens(decoder.net),
        "torch",
        ("--provider is for ONNX Runtime: torch computes on the CPU",) if provider else (),
    )
