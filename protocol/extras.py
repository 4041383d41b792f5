"""How an owner gets packages that are missing: the project's extras, of pyproject.toml."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """Return what to do where an extra's packages are missing: as README installs it."""
    return f"in a clone of the project: pip install '.[{extra}]' -c constraints.txt"
