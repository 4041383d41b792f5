"""Collect the training text: the Python standard library and Debian's documentation.

Everything is read from the machine that runs the training; nothing is downloaded. The
standard-library parts in ``EXCLUDED`` are left out (with their tests), because Tunefleet's
demo uses them as the private text of its simulated devices.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import os
import re
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

EXCLUDED = (
    "pydoc_data",
    "asyncio",
    "email",
    "http",
    "tkinter",
    "idlelib",
    "xml",
    "html",
    "encodings",
    "multiprocessing",
    "concurrent",
    "unittest",
)
"""Standard-library packages that must never reach the training text."""

# Tests of the excluded packages that are not simply named test_<package>.
_TEST_ALIASES = (
    "async", "codecencodings", "cookie", "dom", "elementtree", "expat", "idle", "minidom",
    "mock", "pulldom", "pydoc", "pyexpat", "sax", "tcl", "tk", "tix", "ttk",
)  # fmt: skip
_TEST_OF_EXCLUDED = re.compile(rf"_?test_?_?({'|'.join(EXCLUDED + _TEST_ALIASES)})")
_EXCLUDED_FOLDERS = frozenset(EXCLUDED) | {"site-packages", "dist-packages", "__pycache__"}
_EXCLUDED_TEST_DATA = frozenset({"xmltestdata", "encoded_modules", "cjkencodings", "mock"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

_DOC_SUFFIXES = frozenset({"", ".txt", ".md", ".rst", ".debian", ".pod"})
_MAN_NAME = re.compile(r"\.[1-8][a-z]*(\.gz)?$")
_SHORTEST = 200  # characters; what is shorter holds little but boilerplate
_SHORTEST_PAGE = 500  # the same for a manual page: its frame alone is 200
_DOCSTRING_LENGTHS = range(30, 601)  # characters, for the dialogues
_MAN_TIMEOUT_S = 20
_MAN_PER_FAMILY = 60


@dataclass(frozen=True)
class Document:
    """Hold one text with the kind of place it came from."""

    source: str
    text: str

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the text in hex, the document's identity."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Limits:
    """Cap each source, in bytes of UTF-8 text."""

    stdlib: int = 12_000_000
    tests: int = 4_500_000
    man: int = 4_500_000
    docs: int = 4_500_000
    chat: int = 700_000

    def scaled(self, factor: float) -> Limits:
        """Return the same mix at another size."""
        return Limits(**{name: int(cap * factor) for name, cap in asdict(self).items()})


def shuffle_key(digest: str, seed: int) -> str:
    """Return a sort key that orders documents at random but the same way every time."""
    return hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()


def is_excluded(relative: Path) -> bool:
    """Tell whether a standard-library file belongs to an excluded part or to its tests."""
    stems = [part.split(".")[0] for part in relative.parts]
    if any(stem in _EXCLUDED_FOLDERS or stem in _EXCLUDED_TEST_DATA for stem in stems):
        return True
    return any(_TEST_OF_EXCLUDED.match(stem) for stem in stems)


def mostly_ascii(text: str, share: float = 0.98) -> bool:
    """Tell whether the text looks like code or English: nearly all ASCII."""
    return bool(text) and sum(char < "\x80" for char in text) >= share * len(text)


def read_text(path: Path, cap: int) -> str | None:
    """Read at most cap characters of a UTF-8 file, unpacking .gz; None if it is not text."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as stream:
                raw = stream.read(4 * cap)
        else:
            with path.open("rb") as stream:
                raw = stream.read(4 * cap)
        # A cut in the middle of a character is dropped; any other bad byte means "not UTF-8".
        text = raw.decode("utf-8", errors="strict" if len(raw) < 4 * cap else "ignore")
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    if "\0" in text:
        return None
    text = text.replace("\r\n", "\n")
    if len(text) > cap:
        text = text[:cap].rpartition("\n")[0] + "\n"
    return text


def stdlib_documents() -> Iterator[Document]:
    """Yield the running Python's standard library, without the excluded parts."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata describes one build of Python, with that machine's paths.
        if is_excluded(relative) or relative.name.startswith("_sysconfigdata"):
            continue
        text = read_text(path, cap=400_000)
        if text is None or len(text) < _SHORTEST or not mostly_ascii(text):
            continue
        is_test = bool(_TEST_FOLDERS & set(relative.parts))
        yield Document("tests" if is_test else "stdlib", text)


def doc_documents(root: Path = Path("/usr/share")) -> Iterator[Document]:
    """Yield packages' documentation and the common licences, long ones cut short."""
    paths = sorted((root / "doc").rglob("*")) + sorted((root / "common-licenses").iterdir())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            continue
        plain_name = path.name.removesuffix(".gz").lower()
        if Path(plain_name).suffix not in _DOC_SUFFIXES:
            continue
        # Changelogs and copyright files come with every package: a taste of each will do.
        cap = 40_000
        if "changelog" in plain_name or "changes" in plain_name:
            cap = 5_000
        elif plain_name == "copyright":
            cap = 2_500
        text = read_text(path, cap)
        if text is not None and len(text) >= _SHORTEST and mostly_ascii(text):
            yield Document("docs", text)


def render_man(path: Path) -> str | None:
    """Render one manual page to plain text of 80 columns, or None if that fails."""
    source = read_text(path, cap=300_000)
    if source is None or source.startswith(".so "):
        return None
    command = ["man", "--no-hyphenation", "--no-justification", "-P", "cat", "-l", str(path)]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "MANWIDTH": "80", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_MAN_TIMEOUT_S, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = re.sub(r".\x08", "", done.stdout.decode("utf-8", errors="ignore"))
    text = text[:40_000].strip("\n") + "\n"
    return text if len(text) >= _SHORTEST_PAGE and mostly_ascii(text) else None


def cap_families(pages: list[Path]) -> list[Path]:
    """Keep the first few pages of each family of tools ("git-*", "gcloud_*"), for variety."""
    seen: Counter[str] = Counter()
    kept: list[Path] = []
    for page in pages:
        family = re.split(r"[-_.:]", page.name, maxsplit=1)[0].lower()
        seen[family] += 1
        if seen[family] <= _MAN_PER_FAMILY:
            kept.append(page)
    return kept


def man_documents(seed: int, cap: int, root: Path = Path("/usr/share/man")) -> list[Document]:
    """Return rendered English manual pages, picked at random, of about cap bytes in all."""
    pages = [
        path
        for path in root.glob("man[1-8]/*")
        if not path.is_symlink() and _MAN_NAME.search(path.name)
    ]
    pages.sort(key=lambda path: shuffle_key(f"{path.parent.name}/{path.name}", seed))
    pages = cap_families(pages)
    documents: list[Document] = []
    size = 0
    # Rendering runs in child processes, so threads are enough to keep the cores busy.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for start in range(0, len(pages), 64):
            for text in pool.map(render_man, pages[start : start + 64]):
                if text is not None and size < cap:
                    documents.append(Document("man", text))
                    size += len(text)
            if size >= cap:
                break
    return documents


def take(documents: Iterable[Document], cap: int, seed: int) -> list[Document]:
    """Drop duplicates, shuffle by hash, and keep documents until cap bytes are reached."""
    unique = {document.digest: document for document in documents}
    kept: list[Document] = []
    size = 0
    for digest in sorted(unique, key=lambda digest: shuffle_key(digest, seed)):
        document = unique[digest]
        length = len(document.text.encode())
        if size + length <= cap:
            kept.append(document)
            size += length
    return kept


def docstring_pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield (signature, docstring) for the documented functions and classes of a module."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring) not in _DOCSTRING_LENGTHS:
            continue
        if isinstance(node, ast.ClassDef):
            yield f"class {node.name}", docstring
        else:
            yield f"def {node.name}({ast.unparse(node.args)})", docstring


def load_corpus(limits: Limits, seed: int) -> list[Document]:
    """Collect every source within its cap, without duplicates."""
    library = list(stdlib_documents())
    code = take((d for d in library if d.source == "stdlib"), limits.stdlib, seed)
    tests = take((d for d in library if d.source == "tests"), limits.tests, seed)
    docs = take(doc_documents(), limits.docs, seed)
    man = take(man_documents(seed, limits.man), limits.man, seed)
    unique = {document.digest: document for document in (*code, *tests, *docs, *man)}
    return sorted(unique.values(), key=lambda document: shuffle_key(document.digest, seed))


def split(documents: list[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """Split documents by their own hash into (training, held-out), whatever their order."""
    threshold = int(held_out * 2**32)
    train = [d for d in documents if int(d.digest[:8], 16) >= threshold]
    held = [d for d in documents if int(d.digest[:8], 16) < threshold]
    return train, held
