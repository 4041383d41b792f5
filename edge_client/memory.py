"""How much memory training takes: measured where it can be, predicted from that.

peak above the floor = base weights + the largest of
    a step       LoRA·(weights, Adam's two moments if it has them, gradients if there are any yet)
                 + frozen remainder + fixed
                 + tokens·(activations of a token + rank·intermediates of a token)
    its end      LoRA·(weights, gradients, Adam's moments) + frozen remainder
    loading      the adapters, and what came over the pipe of them in float32

The floor (interpreter, libraries, tokenizer and data), the weights, `fixed` and the activations are
measured on the device by probes for each way of training (edge_client.trainer.probing), which go
the way that a round goes; the rest is counted. All sizes are MiB.

Not counted is the file of the base while it is read: its pages are mapped, and the kernel takes
them back before it would end a process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from protocol.adapter import Shapes, module_rank, parameter_count
from protocol.layers import block_count, last_blocks
from protocol.messages import Training

MIB = float(1 << 20)
WEIGHT_BYTES, GRADIENT_BYTES = 4, 4
"""Bytes of a trained number, all in float32."""
Optimizer = Literal["adamw", "adafactor"]
STATE_BYTES: Mapping[Optimizer, int] = {"adamw": 8, "adafactor": 0}
"""What an optimiser keeps for a trained number between steps: Adam two moments in float32."""
FROZEN_BYTES = {"f32": 4, "bf16": 2, "mixed": 4}
"""Bytes of a number of the frozen remainder and of A·x: they lie in the dtype computed in."""
INTERMEDIATE_BYTES = 4
MAPPED_BYTES = 64 * 1024
"""Tensors from this size on are mapped one by one; see `make_peaks_predictable`."""
HEAP_MAPPED_BYTES = 4 * 1024 * 1024
"""The same where memory is ample; see `keep_freed_memory`."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of training, for which a probe was run."""

    dtype: str
    checkpointing: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe step took: its peak above the floor, in MiB."""

    tokens: int
    rank: int
    held: int
    peak_mib: float
    seconds: float = 0.0
    """What a step took."""


@dataclass(frozen=True, slots=True)
class Activations:
    """What a step takes beside weights and LoRA state: `fixed_mib + beside_mib(tokens)`."""

    fixed_mib: float
    token_mib: float
    least_mib: float = 0.0
    """What the shortest probe took: a moment of a step that hardly depends on its tokens."""
    probed_tokens: int = 0
    """The longest micro-batch that was probed."""
    kept_mib: float = 0.0
    """What a token keeps at least where it is kept; see `kept_mib`."""
    probed: tuple[tuple[int, float], ...] = ()
    """Tokens and MiB, `fixed_mib` included, of each probe, ascending."""

    def beside_mib(self, tokens: int) -> float:
        """Return what `tokens` at a time take beside `fixed_mib`.

        A step has several moments that may be its largest, each of them a line in the tokens, so
        their maximum is convex. The line is that of the two longest probes. Beyond them it may be
        steeper, where what tokens keep has not been the largest yet: by checkpointing little.
        Between two probes such a maximum is at most the chord.
        """
        if self.probed and tokens <= self.probed_tokens:
            at, mib = [t for t, _ in self.probed], [m for _, m in self.probed]
            return float(np.interp(tokens, at, mib)) - self.fixed_mib
        beyond = max(0, tokens - self.probed_tokens) * max(0.0, self.kept_mib - self.token_mib)
        return max(tokens * self.token_mib + beyond, self.least_mib - self.fixed_mib)


def optimizer_of(training: Training) -> Optimizer:
    """Return what trains where nobody plans for memory: AdamW, unless the job has Adafactor."""
    return "adafactor" if training.optimizer == "adafactor" else "adamw"


def optimizers_of(training: Training) -> Sequence[Optimizer]:
    """Return what a plan may have: either, where the job asks for what fits."""
    return ("adamw", "adafactor") if training.optimizer == "fit" else (training.optimizer,)


def lora_mib(
    shapes: Shapes, rank: int, *, gradients: bool = True, optimizer: Optimizer = "adamw"
) -> float:
    """Return weights, optimiser state and gradients of an adapter of `rank`."""
    each = WEIGHT_BYTES + STATE_BYTES[optimizer] + (GRADIENT_BYTES if gradients else 0)
    return parameter_count(shapes, rank) * each / MIB


def remainder_mib(
    shapes: Shapes, rank: int, held: int, dtype: str, trained: Shapes | None = None
) -> float:
    """Return the frozen directions that a device of `rank` holds beside, up to `held`.

    Of modules that are not `trained` (None: all are) those are all that it holds.
    """
    mine = shapes if trained is None else trained
    if held <= rank and mine is shapes:
        return 0.0
    rest = parameter_count(shapes, max(held, rank)) - parameter_count(mine, rank)
    return rest * FROZEN_BYTES[dtype] / MIB


def intermediate_mib(shapes: Shapes, rank: int, dtype: str) -> float:
    """Return what a token keeps of A·x (r,) in every module for the backward pass."""
    return sum(module_rank(s, rank) for s in shapes.values()) * FROZEN_BYTES[dtype] / MIB


def fit(
    probes: Sequence[Probe], shapes: Shapes, weights_mib: float, way: Way, blocks: int = 0
) -> Activations:
    """Return the constants that two or more probes of different length, of `blocks`, imply.

    With checkpointing one block's intermediates exist at a time, so they are left to the slope.
    """

    def rest(probe: Probe) -> float:
        known = _step_mib(
            shapes,
            way,
            probe.rank,
            probe.held,
            probe.tokens,
            accumulates=False,
            trained=_trained(shapes, blocks),
        )
        return probe.peak_mib - weights_mib - known

    ordered = sorted(probes, key=lambda p: p.tokens)
    short, long = ordered[-2:]
    slope = max(0.0, (rest(long) - rest(short)) / (long.tokens - short.tokens))
    kept = kept_mib(_trained(shapes, blocks), way)
    fixed = rest(long) - slope * long.tokens
    probed = tuple((probe.tokens, rest(probe)) for probe in ordered)
    return Activations(fixed, slope, rest(ordered[0]), long.tokens, kept, probed)


def kept_mib(shapes: Shapes, way: Way) -> float:
    """Return what a token keeps at least with checkpointing: a block's modules, and every block.

    What goes into and out of the modules of one block, in float32 for norms and the backward pass
    compute in that, and what goes into each block. Without checkpointing it is nothing: there the
    probes show it all.
    """
    if not way.checkpointing:
        return 0.0
    blocks = block_count(shapes)
    inside = sum(d_out + d_in for d_out, d_in in shapes.values()) / blocks
    between = blocks * min(d_in for _, d_in in shapes.values())
    return (inside * INTERMEDIATE_BYTES + between * FROZEN_BYTES[way.dtype]) / MIB


def predict_mib(
    shapes: Shapes,
    *,
    weights_mib: float,
    activations: Activations,
    way: Way,
    rank: int,
    held: int,
    tokens: int,
    accumulates: bool,
    blocks: int = 0,
    keeps: bool = False,
    optimizer: Optimizer = "adamw",
) -> float:
    """Return the predicted peak above the floor of training `tokens` positions at a time.

    `accumulates`: a step has several micro-batches, so gradients lie beside activations. `blocks`:
    the last so many are trained (0: all), as they were where `activations` was measured. `keeps`:
    what a step took beside the adapters stays with the process, and is there while others load; and
    all gradients come at once. Otherwise Adafactor uses each as it comes, and none is kept.
    """
    frees = optimizer == "adafactor" and not keeps
    trained = _trained(shapes, blocks)
    beside = activations.fixed_mib + activations.beside_mib(tokens)
    step = _step_mib(
        shapes,
        way,
        rank,
        held,
        tokens,
        accumulates=accumulates,
        trained=trained,
        optimizer=optimizer,
        frees=frees,
    )
    remainder = remainder_mib(shapes, rank, held, way.dtype, trained)
    sent = parameter_count(shapes, max(rank, held)) * WEIGHT_BYTES / MIB
    placed = parameter_count(trained, rank) * WEIGHT_BYTES / MIB + remainder
    return weights_mib + max(
        step + beside,
        lora_mib(trained, rank, gradients=not frees, optimizer=optimizer) + remainder,
        sent + placed + (beside if keeps else 0.0),
    )


def _trained(shapes: Shapes, blocks: int) -> Shapes:
    if not blocks:
        return shapes
    return {name: shapes[name] for name in last_blocks(shapes, blocks)}


def _step_mib(
    shapes: Shapes,
    way: Way,
    rank: int,
    held: int,
    tokens: int,
    *,
    accumulates: bool,
    trained: Shapes,
    optimizer: Optimizer = "adamw",
    frees: bool = False,
) -> float:
    """Return what can be counted of what lies beside the activations when they are largest.

    Without checkpointing that is where the backward pass begins: the last step's gradients are
    gone, and there are none yet unless micro-batches went before. With it, it is where it ends.
    `frees`: each gradient is used, and gone, before the next one comes.
    """
    gradients = (way.checkpointing or accumulates) and not frees
    total = lora_mib(trained, rank, gradients=gradients, optimizer=optimizer)
    total += remainder_mib(shapes, rank, held, way.dtype, trained)
    if not way.checkpointing:
        total += tokens * intermediate_mib(trained, rank, way.dtype)
    return total


# -- measuring this process ------------------------------------------------------------------------


def resident_mib() -> float:
    """Return the resident memory of this process now."""
    if sys.platform == "linux":
        return _status_mib("VmRSS")
    import psutil

    return float(psutil.Process().memory_info().rss) / MIB


def peak_mib() -> float:
    """Return the largest resident memory since the process began or `reset_peak` was called."""
    if sys.platform == "linux":
        return _status_mib("VmHWM")
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def reset_peak() -> None:
    """Let the peak start again from what is resident now (Linux; elsewhere it can't)."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def restrain_libraries() -> None:
    """Set what libraries read when torch is imported: small kernel caches, no spinning threads.

    oneDNN would cache a kernel for each of a thousand shapes; 128 took 15 MiB more than 16 with
    base-tiny in bf16 and were no faster. OpenMP threads that spin while they
    wait take the cores from whatever else runs on the device, and training with them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def return_freed_memory() -> None:
    """Give freed heap pages back to the system (glibc)."""
    if libc := _libc():
        libc.malloc_trim(0)


def make_peaks_predictable() -> None:
    """Have glibc map tensors one by one, so that freed ones leave the process at once.

    Left to itself the allocator keeps and fragments what training frees, by up to a third of the
    peak and never twice alike; from 128 KiB on, its own threshold, by a fifth with a small model,
    whose tensors are mostly smaller. This costs a quarter to two fifths of the speed, in page
    faults. Transparent huge pages would round tensors up to 2 MiB.
    """
    if libc := _libc():
        m_arena_max = -8
        _map_from(libc, MAPPED_BYTES)
        libc.mallopt(m_arena_max, 1)
        pr_set_thp_disable = 41
        libc.prctl(pr_set_thp_disable, 1, 0, 0, 0)


def keep_freed_memory() -> None:
    """Have glibc keep most of what training frees for what it takes next: for plans with room.

    A model of 135 M parameters trained a quarter faster so, and took an eighth more above the
    floor; base-tiny took up to a fifth more.
    """
    if libc := _libc():
        _map_from(libc, HEAP_MAPPED_BYTES)


def _map_from(libc: ctypes.CDLL, size: int) -> None:
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, size)
    libc.mallopt(m_trim_threshold, size)


def offer_to_oom_killer() -> None:
    """Ask the kernel to end this process before others when memory runs out (Linux)."""
    try:
        Path("/proc/self/oom_score_adj").write_text("800")
    except OSError:
        return


def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None  # musl has none


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) / 1024 if found else 0.0
