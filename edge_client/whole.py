"""Put a folder of files in its place whole: an export, an artifact set.

    beside it: .NAME.tunefleet-xxxxxxxx/whole → NAME;  what was NAME → …/old, and is deleted

Whatever stops it, what was there before is there still, in its place or beside it; what a kill
leaves beside is put back, or deleted, by the next one.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from edge_client.errors import ConfigError
from edge_client.storage import keeping

WHOLE, OLD = "whole", "old"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def put_whole(
    out: Path, what: str, is_earlier: Callable[[Path], bool], option: str
) -> Iterator[Path]:
    """Yield an empty folder to write `what` into, and put it in the place of `out` at the end.

    Beside it there is room for other files, which are deleted. Files get the mode that the umask
    says, whatever the library that wrote them chose. `is_earlier` says of a folder that is not
    empty whether it may be replaced; `option` is how the owner names `out`.

    Raises:
        ConfigError: `out` is a file, or holds something else.
        StorageError: it can't be written; what was in `out` is there still.
    """
    out = out.resolve()
    with keeping(what, out, option), ExitStack() as stack:
        _tidy(out)
        _check_place(out, what, is_earlier)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix=_prefix(out)))
        )
        stack.callback(os.close, _lock(temporary))
        whole = temporary / WHOLE
        whole.mkdir()
        mode = whole.stat().st_mode & 0o666
        try:
            yield whole
        except SafetensorError as error:  # which wraps those of the disk
            if found := _OS_ERROR.search(str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
            raise
        for path in whole.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        _swap(whole, out, temporary / OLD)


def _swap(whole: Path, out: Path, old: Path) -> None:
    if out.exists():
        out.rename(old)
    try:
        whole.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _check_place(out: Path, what: str, is_earlier: Callable[[Path], bool]) -> None:
    """Refuse to write over anything that was not written by the like."""
    try:
        taken = out.exists() and any(out.iterdir()) and not is_earlier(out)
    except OSError as error:
        raise ConfigError(f"can't write {what} to {out}: {error.strerror}") from None
    if taken:
        raise ConfigError(f"{out} holds something else than {what}; name another folder")


def _tidy(out: Path) -> None:
    """Delete what killed ones left beside `out`, and put back what one of them moved away."""
    if not out.parent.is_dir():
        return
    for left in sorted(out.parent.iterdir()):
        if not left.name.startswith(_prefix(out)):
            continue
        try:
            lock = _lock(left)
        except OSError:  # another one is at work, or it is another user's
            continue
        try:
            if (left / OLD).is_dir() and not out.exists():
                (left / OLD).rename(out)
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _prefix(out: Path) -> str:
    return f".{out.name}.tunefleet-"


def _lock(folder: Path) -> int:
    """Lock a folder for as long as this process lives and the descriptor that it returns is open.

    Raises:
        OSError: another has locked it, or it is not this user's.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
