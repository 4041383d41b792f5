"""Read pickles of plain values alone: numbers, text, lists, tuples, dicts.

A pickle is a program for a small stack machine. Python's own reader can be kept from finding names,
but a few bytes can still make it ask for gigabytes. This machine lacks the instructions that name,
call or set up anything; what it takes in memory is in proportion to the file.
https://docs.python.org/3/library/pickletools.html describes the instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

MAX_DIGITS = 1000
"""Of a number written as text."""
MARK = object()
"""What MARK puts on the stack; nothing that is read can be it."""
KEYS = (str, int, float, type(None))
"""Of a dict. Tuples could be nested so deeply that hashing them ends the process."""
MAX_KEY_BITS = 64
"""Of a number as a key: of longer ones many have one hash, and a dict of those takes for ever."""
FAULTS = (IndexError, KeyError, OverflowError, struct.error, UnicodeError, ValueError)
"""What damaged bytes end in."""


class NotPlain(Exception):
    """The bytes are damaged, or hold more than plain values; says what."""


def load_plain(data: bytes) -> object:
    """Return the value that a pickle of plain values holds, of any protocol up to 5.

    Raises:
        NotPlain: it holds anything else, or is no whole pickle.
    """
    try:
        return _Machine(data).run()
    except FAULTS as error:
        raise NotPlain(f"it is damaged ({type(error).__name__})") from None


class _Machine:
    """Run a pickle's instructions."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        """Run until STOP, and return what is on top."""
        data, instructions = self.data, INSTRUCTIONS
        while True:
            code = data[self.at]
            self.at += 1
            if code == STOP:
                return self.pop()
            instruction = instructions.get(code)
            if instruction is None:
                self.refuse(code)
            instruction(self)

    # -- bytes and the stack ---------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise IndexError
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, form: str) -> Any:
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return found

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        found = self.data[self.at : end]
        self.at = end + 1
        return found.decode("raw_unicode_escape")

    def digits(self) -> str:
        text = self.line()
        if len(text) > MAX_DIGITS:
            raise ValueError
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        found = self.stack.pop()
        if found is MARK:
            raise ValueError
        return found

    def since_mark(self) -> list[Any]:
        """Take off the stack what was put on it since the last MARK."""
        index = len(self.stack) - 1
        while self.stack[index] is not MARK:
            index -= 1
            if index < 0:
                raise IndexError
        found = self.stack[index + 1 :]
        del self.stack[index:]
        return found

    def into_list(self, values: list[Any]) -> None:
        top = self.stack[-1]
        if type(top) is not list:
            raise ValueError
        top.extend(values)

    def into_dict(self, values: list[Any]) -> None:
        top = self.stack[-1]
        if type(top) is not dict:
            raise ValueError
        top.update(_pairs(values))

    def short_long(self) -> int:
        return int.from_bytes(self.take(self.number("<B")), "little", signed=True)

    def refuse(self, code: int) -> NoReturn:
        """Say what the pickle would have done."""
        if code in b"ci":
            raise NotPlain(f"it names {self.line()[:60]}.{self.line()[:60]}")
        if code == STACK_GLOBAL and all(type(name) is str for name in self.stack[-2:]):
            raise NotPlain(f"it names {'.'.join(name[:60] for name in self.stack[-2:])}")
        raise NotPlain(f"it has an instruction (0x{code:02x}) that plain values do not need")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    keys = values[::2]
    if len(values) % 2 or not all(isinstance(key, KEYS) for key in keys):
        raise NotPlain("a dict in it has keys that are neither text nor numbers")
    if any(isinstance(key, int) and key.bit_length() > MAX_KEY_BITS for key in keys):
        raise NotPlain(f"a dict in it has a number of over {MAX_KEY_BITS} bits as a key")
    return dict(zip(keys, values[1::2], strict=True))


def _int_line(text: str) -> int | bool:
    """Read a number of protocol 0, in which 00 and 01 are false and true."""
    return text == "01" if text in ("00", "01") else int(text.removesuffix("L"))


STOP, STACK_GLOBAL = ord("."), 0x93
INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: what follows is read as if there were none
    ord("("): lambda m: m.push(MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.since_mark(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    # constants and numbers
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): lambda m: m.push(_int_line(m.digits())),
    ord("L"): lambda m: m.push(_int_line(m.digits())),
    ord("F"): lambda m: m.push(float(m.digits())),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("G"): lambda m: m.push(m.number(">d")),
    0x8A: lambda m: m.push(m.short_long()),
    # text
    ord("V"): lambda m: m.push(m.line()),
    ord("X"): lambda m: m.push(m.take(m.number("<I")).decode("utf-8")),
    0x8C: lambda m: m.push(m.take(m.number("<B")).decode("utf-8")),
    0x8D: lambda m: m.push(m.take(m.number("<Q")).decode("utf-8")),
    ord("U"): lambda m: m.push(m.take(m.number("<B")).decode("latin-1")),  # of Python 2
    # lists, dicts, tuples
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord("a"): lambda m: m.into_list([m.pop()]),
    ord("e"): lambda m: m.into_list(m.since_mark()),
    ord("}"): lambda m: m.push({}),
    ord("d"): lambda m: m.push(_pairs(m.since_mark())),
    ord("s"): lambda m: m.into_dict([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.into_dict(m.since_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.push((m.pop(),)),
    0x86: lambda m: m.push((m.pop(), m.pop())[::-1]),
    0x87: lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    # what was put aside
    ord("p"): lambda m: m.memo.update({int(m.digits()): m.stack[-1]}),
    ord("q"): lambda m: m.memo.update({m.number("<B"): m.stack[-1]}),
    ord("r"): lambda m: m.memo.update({m.number("<I"): m.stack[-1]}),
    0x94: lambda m: m.memo.update({len(m.memo): m.stack[-1]}),
    ord("g"): lambda m: m.push(m.memo[int(m.digits())]),
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
}
