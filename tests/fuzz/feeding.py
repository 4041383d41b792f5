"""What a parser of strangers' bytes may do, and the run that feeds one.

A parser may take what it is given or refuse it with an error that a person can read as one line
(`TunefleetError`); what it took must also be fit to be written down and read again. Any other
exception is a fault, and so is memory out of proportion to the input.
"""

from __future__ import annotations

import random
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import TunefleetError
from tests.fuzz.mutate import mutated

MEMORY_BASE, MEMORY_EACH = 2 << 20, 64
"""Bytes that a parser may need for itself, and for each byte of its input."""
Make = Callable[[random.Random, Sequence[bytes]], bytes]


class Fault(AssertionError):
    """Say which parser failed on which bytes."""


@dataclass
class Parser:
    """Hold what parses, samples of what it takes, and what has come of it."""

    name: str
    samples: Sequence[bytes]
    parse: Callable[[bytes], None]
    """Raises TunefleetError for what it refuses."""
    make: Make = mutated
    accepted: int = 0
    refused: int = 0
    worst: int = 0
    """Most bytes of memory for one input."""

    def feed(self, data: bytes) -> None:
        """Parse one input.

        Raises:
            Fault: an error of the wrong type, or too much memory.
        """
        traced = tracemalloc.is_tracing()
        if traced:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
        try:
            self.parse(data)
        except TunefleetError:
            self.refused += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(where.filename).name}:{where.lineno}"
            raise Fault(f"{self.name}: {error!r} ({at}) for {_shown(data)}") from error
        else:
            self.accepted += 1
        if traced:
            used = tracemalloc.get_traced_memory()[1] - before
            self.worst = max(self.worst, used)
            if used > MEMORY_BASE + MEMORY_EACH * len(data):
                raise Fault(f"{self.name}: {used} bytes of memory for {_shown(data)}")

    def run(self, inputs: int, seed: int = 0) -> None:
        """Feed the samples, then that many mutations of them."""
        rng = random.Random(seed ^ zlib.crc32(self.name.encode()))
        for sample in self.samples:
            self.feed(sample)
        for _ in range(inputs):
            self.feed(self.make(rng, self.samples))


@contextmanager
def traced() -> Iterator[None]:
    """Count the memory of what is fed."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def _shown(data: bytes) -> str:
    return f"{len(data)} bytes {data[:300]!r}"
