"""How fast a model answers here, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from edge_client.chat.generate import chooser
from edge_client.chat.speaker import Speaker
from edge_client.errors import DataError
from edge_client.memory import peak_mib

PROMPT_TOKENS = 128
_TEXT = "What a device has learnt of its own text is of use where it was learnt. "


@dataclass(frozen=True, slots=True)
class Bench:
    """What answering once took."""

    runs_on: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    """From the prompt to the first token."""
    prefill_tokens_s: float
    decode_tokens_s: float
    """Of the tokens after the first."""
    peak_mib: float
    """The largest resident memory of the whole process since its start."""

    def as_dict(self) -> dict[str, object]:
        """Return the figures by name."""
        return asdict(self)

    def __str__(self) -> str:
        """Return them for people."""
        return (
            f"{self.runs_on}, {self.threads} threads: read {self.prompt_tokens} tokens at "
            f"{self.prefill_tokens_s:.0f} tokens/s (first token after {self.first_token_s:.2f} s), "
            f"wrote {self.new_tokens} at {self.decode_tokens_s:.1f} tokens/s; peak memory "
            f"{self.peak_mib:.0f} MiB"
        )


def bench(speaker: Speaker, prompt: str | None, max_tokens: int, threads: int) -> Bench:
    """Read a prompt, or a made one of 128 tokens, and write `max_tokens` likeliest tokens.

    Nothing stops it earlier but the model's context. A first short run warms up, uncounted.

    Raises:
        DataError: the prompt is empty or too long.
    """
    ids = _prompt(speaker, prompt, max_tokens)
    room = speaker.context_tokens - len(ids) if speaker.context_tokens else max_tokens
    most = max(2, min(max_tokens, room))
    choose = chooser(0, 1, None)
    speaker.reading.read(ids[:1])
    speaker.reading.forget()
    begun = time.perf_counter()
    token = choose(speaker.reading.read(ids))
    first = time.perf_counter()
    for _ in range(most - 1):
        token = choose(speaker.reading.more([token]))
    done = time.perf_counter()
    return Bench(
        speaker.runs_on,
        threads,
        len(ids),
        most,
        first - begun,
        len(ids) / (first - begun),
        (most - 1) / (done - first),
        peak_mib(),
    )


def _prompt(speaker: Speaker, prompt: str | None, max_tokens: int) -> Sequence[int]:
    if prompt is not None:
        if not prompt.strip():
            raise DataError("there is nothing to answer: the text is empty")
        return speaker.prompt([{"role": "user", "content": prompt}], max(2, max_tokens))
    ids: list[int] = speaker.tokenizer([_TEXT * 10], add_special_tokens=False)["input_ids"][0]
    most = min(PROMPT_TOKENS, (speaker.context_tokens or 2 * PROMPT_TOKENS) // 2)
    return ids[:most]
