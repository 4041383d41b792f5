"""Rounds to merge, in memory or in files, and dense ways to merge them: one in float32, as public
FlexLoRA code does it, and one in float64 to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from aggregator.merge import RoundView, Update
from protocol.adapter import Adapter, Factors, LazyLayers, Shapes, initial_adapter

RANKS = (4, 8, 16, 32)
RANK, SCALE = 64, 2.0
Spectrum = Literal["separated", "flat"]
Dense = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Case:
    """A round: how many devices, of which ranks (in turn), for which modules."""

    devices: int
    shapes: Shapes
    ranks: tuple[int, ...] = RANKS
    spectrum: Spectrum = "separated"

    def rank_of(self, device: int) -> int:
        return self.ranks[device % len(self.ranks)]

    @property
    def stack(self) -> int:
        """Σr_k."""
        return sum(self.rank_of(k) for k in range(self.devices))

    @property
    def stack_bytes(self) -> int:
        """Bytes of the largest module's factors, all devices', in float32."""
        return 4 * self.stack * max(sum(shape) for shape in self.shapes.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the merged adapter, all modules', in float32."""
        return 4 * RANK * sum(sum(shape) for shape in self.shapes.values())

    def __str__(self) -> str:
        (d_out, d_in), modules = next(iter(self.shapes.values())), len(self.shapes)
        return f"{self.devices} devices, {modules} x {d_out}x{d_in}, {self.spectrum}"


def one_module(devices: int, shape: tuple[int, int], spectrum: Spectrum = "separated") -> Case:
    return Case(devices, {"m": shape}, spectrum=spectrum)


def device_factors(case: Case, module: str, device: int) -> Factors:
    """Draw a device's factors of a module.

    `flat`: all at random. `separated`: within RANK directions that the fleet shares, at falling
    sizes, and a hundredth at random besides, so that the best rank-RANK sum is unique.
    """
    d_out, d_in = case.shapes[module]
    rank = case.rank_of(device)
    rng = np.random.default_rng([device, len(module)])
    a = rng.standard_normal((rank, d_in), np.float32)
    b = rng.standard_normal((d_out, rank), np.float32)
    if case.spectrum == "separated":
        shared = np.random.default_rng(0)
        rows = shared.standard_normal((RANK, d_in), np.float32)
        mix = rng.standard_normal((rank, RANK), np.float32) * np.geomspace(1, 0.3, RANK)
        a = (mix @ rows / np.sqrt(RANK) + 0.01 * a).astype(np.float32)
    return Factors(a, b / np.float32(np.sqrt(case.stack)))


def round_in_memory(case: Case) -> RoundView:
    """Return the round of a case; modules of one shape share their numbers."""
    updates = []
    for k in range(case.devices):
        drawn: dict[tuple[int, int], Factors] = {}
        for module, shape in case.shapes.items():
            if shape not in drawn:
                drawn[shape] = device_factors(case, module, k)
        layers = {module: drawn[shape] for module, shape in case.shapes.items()}
        updates.append(_update(case, k, layers))
    return _view(case, updates)


# ---- in files ---------------------------------------------------------------------------------


def file_layers(folder: Path, case: Case, device: int) -> LazyLayers:
    """Return a device's factors, of which each module's are read from its file when asked for."""
    rank = case.rank_of(device)

    def read(module: str) -> Factors:
        d_out, d_in = case.shapes[module]
        numbers = np.fromfile(folder / f"{device}-{module}", np.float32)
        return Factors(
            numbers[: rank * d_in].reshape(rank, d_in), numbers[rank * d_in :].reshape(d_out, rank)
        )

    return LazyLayers(tuple(case.shapes), read)


def write_round(case: Case, folder: Path) -> list[Path]:
    """Write every device's factors; return the files."""
    files = []
    for k in range(case.devices):
        for module in case.shapes:
            factors = device_factors(case, module, k)
            files.append(folder / f"{k}-{module}")
            with files[-1].open("wb") as file:
                factors.a.tofile(file)
                factors.b.tofile(file)
    return files


def round_in_files(case: Case, folder: Path) -> RoundView:
    """Return a round whose factors are read when a rule asks for them."""
    return _view(
        case, [_update(case, k, file_layers(folder, case, k)) for k in range(case.devices)]
    )


def _update(case: Case, device: int, layers: Mapping[str, Factors]) -> Update:
    at = {module: np.arange(case.rank_of(device)) for module in case.shapes}
    return Update(f"d{device}", Adapter(layers, SCALE), at, 1, {})


def _view(case: Case, updates: list[Update]) -> RoundView:
    return RoundView(initial_adapter(case.shapes, RANK, SCALE, 0), updates, case.shapes, RANK, 0)


# ---- dense ------------------------------------------------------------------------------------


def dense_float32(view: RoundView) -> dict[str, Factors]:
    """Merge as public FlexLoRA code does: a dense float32 sum and `torch.linalg.svd` a module."""
    share = SCALE / len(view.updates)
    merged = {}
    for module, shape in view.shapes.items():
        total = torch.zeros(shape)
        for update in view.updates:
            f = update.adapter.layers[module]
            total += share * (torch.from_numpy(f.b) @ torch.from_numpy(f.a))
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        b = u[:, :RANK] * (s[:RANK] / SCALE)
        merged[module] = Factors(vt[:RANK].numpy(), b.numpy())
    return merged


@dataclass(frozen=True, slots=True)
class Errors:
    """Hold how far a merged module is from the float64 oracle.

    `distance` is ‖result − best‖/‖best‖, `excess` (‖sum − result‖ − ‖sum − best‖)/‖sum − best‖.
    """

    distance: float
    excess: float


class Oracle:
    """Hold one module's sum in float64 and its best form of rank RANK, by a full SVD."""

    def __init__(self, view: RoundView, module: str = "m") -> None:
        self._total = np.zeros(view.shapes[module])
        for update in view.updates:
            f = update.adapter.layers[module]
            self._total += f.b.astype(np.float64) @ f.a.astype(np.float64)
        self._total *= SCALE / len(view.updates)
        u, s, vt = _svd(self._total)
        self._best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        self._error = float(np.sqrt(np.sum(s[RANK:] ** 2)))

    def errors(self, result: Factors) -> Errors:
        """Compare a result."""
        ours = SCALE * (result.b.astype(np.float64) @ result.a.astype(np.float64))
        distance = np.linalg.norm(ours - self._best) / np.linalg.norm(self._best)
        error = np.linalg.norm(self._total - ours)
        return Errors(float(distance), float(error / self._error - 1))


def _svd(total: Dense) -> tuple[Dense, Dense, Dense]:
    """Return an SVD; a wide matrix is first made square by a QR, which is exact to rounding."""
    if total.shape[1] <= total.shape[0]:
        return np.linalg.svd(total, full_matrices=False)
    q, r = np.linalg.qr(total.T)
    u, s, vt = np.linalg.svd(r.T)
    return u, s, vt @ q.T
