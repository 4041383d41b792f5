"""The public text of a job's `[probe]`, where a job file names it by a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aggregator.errors import ConfigError


def with_probe_text(fields: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Return a job's settings with the text of its probe in the place of `probe.file`.

    The file's path starts from `folder`. Settings that name none are returned as they are.

    Raises:
        ConfigError: neither or both are given, or the file can't be read as UTF-8 text.
    """
    probe = fields.get("probe")
    if not isinstance(probe, Mapping) or ("text" in probe and "file" not in probe):
        return dict(fields)
    if "text" in probe:
        raise ConfigError(f"{where}: probe: has a text and a file; leave one of them")
    if "file" not in probe:
        raise ConfigError(f"{where}: probe: needs a text, or a file that has it")
    text = _read(probe["file"], folder, where)
    others = {name: value for name, value in probe.items() if name != "file"}
    return {**fields, "probe": {**others, "text": text}}


def _read(name: object, folder: Path, where: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ConfigError(f"{where}: probe.file: must be the path of a text file")
    path = folder / name
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{where}: probe.file: there is no such file: {path}") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"{where}: probe.file: can't read {path}: {why}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: probe.file: {path} is not UTF-8 text") from None
