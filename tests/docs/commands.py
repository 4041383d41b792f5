"""The commands that README and docs show, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Return all documents with commands for a reader."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(document: Path) -> list[str]:
    """Return the commands of a document's sh blocks, in order, without comments."""
    found = []
    for block in BLOCK.findall(document.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+# .*$", "", line).strip()
            if command and not command.startswith("#"):
                found.append(" ".join(command.split()))
    return found


def all_commands() -> dict[str, str]:
    """Return every command, and the document that shows it first."""
    found: dict[str, str] = {}
    for document in documents():
        for command in commands_of(document):
            found.setdefault(command, document.name)
    return found
