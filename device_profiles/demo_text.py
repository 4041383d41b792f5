"""Make the private text of the demo's six devices from the running Python's standard library.

Each device gets one part of the library, so that their texts differ as those of six people do:
prose, network code, tables. base-tiny has seen none of these parts (`base_tiny.corpus.EXCLUDED`).

The text is under the licence of the Python Software Foundation (PSF-2.0). It is read from the
Python that runs, and neither shipped with tunefleet nor downloaded.
"""

from __future__ import annotations

import importlib
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from device_profiles.errors import DemoTextError

TARGET_BYTES = 80_000
TARGET_RANGE_BYTES = (60_000, 150_000)

SMALLEST_DOCUMENT_BYTES = 200  # below it there's an empty __init__.py or a bare import
LARGEST_DOCUMENT_SHARE = 1 / 3  # of the target; a larger file would crowd out the others

_CHARMAP_TABLE = "decoding_table"


@dataclass(frozen=True, slots=True)
class Document:
    """Hold one file of a part: its name in the part's folder, and its text."""

    name: str
    text: str

    @property
    def size_bytes(self) -> int:
        """Return the size in bytes of UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True, slots=True)
class DemoPart:
    """Hold the text of one device: the folder's name, what it is, and its documents by name."""

    name: str
    title: str
    documents: tuple[Document, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of all documents in bytes of UTF-8."""
        return sum(document.size_bytes for document in self.documents)


@dataclass(frozen=True, slots=True)
class _Source:
    """Name a part and the packages that it's read from, which share it evenly."""

    name: str
    title: str
    packages: tuple[str, ...]


_SOURCES = (
    _Source("topics", "Help on the Python language, in prose", ("pydoc_data",)),
    _Source("asyncio", "Event loops, streams and tasks", ("asyncio",)),
    _Source("email", "Mail messages and web servers", ("email", "http")),
    _Source("multiprocessing", "Processes, pools and futures", ("multiprocessing", "concurrent")),
    _Source("markup", "XML and HTML parsers", ("xml", "html")),
    _Source("encodings", "Codecs and character tables", ("encodings",)),
)

PART_NAMES = tuple(source.name for source in _SOURCES)


def demo_parts(
    *, seed: int = 0, target_bytes: int = TARGET_BYTES, library: Path | None = None
) -> list[DemoPart]:
    """Read the six parts, each of whole files that come to at most `target_bytes`.

    The same Python and seed give the same files. `library` is the folder of the standard library;
    by default that of the running Python.

    Raises:
        DemoTextError: the target isn't in 60,000 to 150,000 bytes, or the library lacks a part.
    """
    smallest, largest = TARGET_RANGE_BYTES
    if not smallest <= target_bytes <= largest:
        raise DemoTextError(
            f"a part of the demo text takes {smallest} to {largest} bytes, not {target_bytes}"
        )
    root = library or Path(sysconfig.get_path("stdlib"))
    return [_part(source, root, seed, target_bytes) for source in _SOURCES]


def write_demo_text(
    folder: Path, *, seed: int, target_bytes: int = TARGET_BYTES, library: Path | None = None
) -> list[DemoPart]:
    """Write each part to a folder of its name inside `folder`, and return the parts.

    Writing again with the same seed changes nothing.

    Raises:
        DemoTextError: as `demo_parts`; or a part's folder holds other files, which a device would
            read as its own, or can't be written.
    """
    parts = demo_parts(seed=seed, target_bytes=target_bytes, library=library)
    try:
        for part in parts:
            _write_part(folder / part.name, part)
    except OSError as error:
        raise DemoTextError(
            f"cannot write the demo text to {folder} ({error.strerror or error}); "
            "name a folder that you may write to"
        ) from error
    return parts


def _write_part(folder: Path, part: DemoPart) -> None:
    """Write the documents of a part to its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    strange = {file.name for file in folder.iterdir()} - {d.name for d in part.documents}
    if strange:
        raise DemoTextError(
            f"{folder} holds files of something else ({min(strange)}); empty it, or name another"
        )
    for document in part.documents:
        (folder / document.name).write_bytes(document.text.encode())


def _part(source: _Source, library: Path, seed: int, target_bytes: int) -> DemoPart:
    """Return a part, filled evenly from the groups of its documents."""
    groups = []
    for package in source.packages:
        documents = _topics() if package == "pydoc_data" else _modules(library, package)
        # Character tables are large and alike; they are a group by themselves lest they fill
        # the part of the codecs.
        tables = [document for document in documents if _CHARMAP_TABLE in document.text]
        others = [document for document in documents if _CHARMAP_TABLE not in document.text]
        groups += [group for group in (tables, others) if group]
    chosen = _choose(groups, random.Random(f"{seed} {source.name}"), target_bytes)
    part = DemoPart(source.name, source.title, tuple(sorted(chosen, key=lambda d: d.name)))
    if part.size_bytes < TARGET_RANGE_BYTES[0] // 2:
        raise _missing(" and ".join(source.packages), f"only {part.size_bytes} bytes of text")
    return part


def _choose(
    groups: Sequence[Sequence[Document]], order: random.Random, target_bytes: int
) -> list[Document]:
    """Return whole documents up to the target, each next one from the group that has least."""
    waiting = [order.sample(group, len(group)) for group in groups]
    taken = [0] * len(groups)  # bytes
    chosen: list[Document] = []
    while any(waiting):
        least = min((g for g in range(len(groups)) if waiting[g]), key=lambda g: taken[g])
        document = waiting[least].pop()
        size = document.size_bytes
        fits = size <= target_bytes * LARGEST_DOCUMENT_SHARE and sum(taken) + size <= target_bytes
        if fits and size >= SMALLEST_DOCUMENT_BYTES:
            taken[least] += size
            chosen.append(document)
    return chosen


def _topics() -> list[Document]:
    """Return the help topics of pydoc, one document each."""
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError:
        raise _missing("pydoc_data", "cannot be imported") from None
    topics: Mapping[str, str] = module.topics
    # A file system may not tell capitals from small letters, so the name does not either.
    named = {re.sub(r"[^a-z0-9]+", "-", name.lower()): name for name in sorted(topics)}
    return [Document(f"{file}.txt", topics[name]) for file, name in sorted(named.items())]


def _modules(library: Path, package: str) -> list[Document]:
    """Return the source files of a package and those inside it, named as modules, in order."""
    found = list(_sources_below(library / package, package))
    if not found:
        raise _missing(package, f"no source files in {library / package}")
    return sorted(found, key=lambda document: document.name)


def _sources_below(folder: Path, prefix: str) -> Iterator[Document]:
    """Yield the Python files of a folder and its subfolders, tests and caches left out."""
    for file in folder.rglob("*.py"):
        inside = file.relative_to(folder)
        if {"test", "tests", "__pycache__"} & set(inside.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # one file less; too few of them is an error later
        yield Document(".".join((prefix, *inside.parts)), text)


def _missing(what: str, why: str) -> DemoTextError:
    return DemoTextError(
        f"this Python's standard library lacks {what} ({why}), which the demo's devices read; "
        "install the whole library (Debian, Ubuntu: apt install libpython3-stdlib; elsewhere "
        "Python from python.org), or give the devices text of your own"
    )
