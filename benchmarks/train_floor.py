"""The floor of a training step: the time of its matrix products alone, at this machine's rate."""

from __future__ import annotations

import time
from collections import Counter
from multiprocessing.connection import Connection

from protocol.adapter import Shapes

REPEATS = 5


def frozen_products(shapes: Shapes, hidden: int, vocabulary: int) -> Counter[tuple[int, int]]:
    """Return how often each (d_out, d_in) is multiplied with, once forward and once backward."""
    products = Counter(shapes.values())
    products[vocabulary, hidden] += 1
    return products


def step_flops(shapes: Shapes, hidden: int, vocabulary: int, tokens: int, rank: int) -> float:
    """Return the floating-point operations of a step's matrix products, without attention's.

    Forward and the gradient of the input, 2 each for every weight and token; the adapter's, six
    products of rank r with each side of a module.
    """
    frozen = sum(a * b * n for (a, b), n in frozen_products(shapes, hidden, vocabulary).items())
    lora = sum(rank * (d_out + d_in) for d_out, d_in in shapes.values())
    return 2.0 * tokens * (2 * frozen + 3 * lora)


def floor_seconds(
    connection: Connection,
    products: Counter[tuple[int, int]],
    tokens: int,
    rank: int,
    dtype: str,
    threads: int,
) -> None:
    """Send the seconds (wall, processor) of a step's products, each shape measured by itself."""
    import torch

    from edge_client.trainer.torch_trainer import DTYPES

    torch.set_num_threads(threads)
    kind = DTYPES[dtype]
    wall = processor = 0.0
    for (d_out, d_in), count in products.items():
        weight = torch.randn(d_out, d_in, dtype=kind)
        a, b = torch.randn(rank, d_in, dtype=kind), torch.randn(d_out, rank, dtype=kind)
        x, dy = torch.randn(tokens, d_in, dtype=kind), torch.randn(tokens, d_out, dtype=kind)
        inner = torch.randn(tokens, rank, dtype=kind)
        pairs = [(x, weight.t()), (dy, weight)]
        if d_out <= 16 * d_in:  # not the head, which has no adapter
            pairs += [
                (x, a.t()),
                (inner, b.t()),
                (dy, b),
                (inner, a),
                (inner.t(), x),
                (dy.t(), inner),
            ]
        for left, right in pairs:
            left @ right
            best = (float("inf"), float("inf"))
            for _ in range(REPEATS):
                began = time.perf_counter(), time.process_time()
                left @ right
                best = (
                    min(best[0], time.perf_counter() - began[0]),
                    min(best[1], time.process_time() - began[1]),
                )
            wall, processor = wall + count * best[0], processor + count * best[1]
    connection.send((wall, processor))
