"""One adapter of the device's own in a job, on disk, as it was after this many rounds or parts.

Files are numbered: what a number is made of is an earlier one, so that a device that is killed at
any point does the same number again from the same file.
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_client.errors import StorageError
from edge_client.storage import keeping
from protocol.adapter import Adapter, module_rank
from protocol.bands import read_adapter, to_tensors
from protocol.errors import BadTensors
from protocol.files import PRIVATE, write_durably
from protocol.messages import Job
from protocol.tensors import encode


class NumberedAdapter:
    """Keep the numbered states of `what`, an adapter of `rank`, in `folder` of the state folder.

    Raises, as every method does:
        StorageError: it can't be kept or read, or what was kept is damaged.
    """

    def __init__(
        self, job: Job, rank: int, state: Path, *, folder: str, what: str, counts: str
    ) -> None:
        """`counts` names what the numbers count: "part", "round"."""
        self._job, self._rank, self._state = job, rank, state
        self._folder, self._what, self._counts = state / folder, what, counts

    def newest(self, below: int | None = None) -> int | None:
        """Return the highest number that is kept, of those below another."""
        return max((n for n in self._kept() if below is None or n < below), default=None)

    def keep(self, number: int, adapter: Adapter, *, made_of: int | None = None) -> None:
        """Keep a state, and the one that it was made of; the others are removed."""
        with keeping(self._what, self._state):
            data = encode(to_tensors(adapter), "f32")
            write_durably(self._file(number), data, mode=PRIVATE)
            for one in self._kept():
                if one not in (made_of, number):
                    self._file(one).unlink()

    def read(self, number: int) -> Adapter:
        """Return the adapter as it was kept."""
        job, path = self._job, self._file(number)
        shapes = job.base.modules
        ranks = {name: module_rank(shape, self._rank) for name, shape in shapes.items()}
        try:
            with keeping(self._what, self._state):
                return read_adapter(path.read_bytes(), shapes, ranks, job.scale, "f32")
        except BadTensors as error:
            raise StorageError(
                f"{self._what} in {path} is damaged ({error}); bring it back from a backup, "
                "or take the file away to begin a new one"
            ) from None

    def _file(self, number: int) -> Path:
        name = f"{self._job.job}.r{self._rank}.{self._counts}{number}.safetensors"
        return self._folder / name

    def _kept(self) -> list[int]:
        pattern = re.escape(self._file(0).name).replace(f"{self._counts}0", rf"{self._counts}(\d+)")
        names = (path.name for path in self._folder.glob("*.safetensors"))
        return [int(found[1]) for name in names if (found := re.fullmatch(pattern, name))]
