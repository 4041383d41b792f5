"""Self-pruning under torch: the gradient of the penalty on the tails of an adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edge_client.prune import head_rank, penalty_gradient
from protocol.messages import Pruning


class Press:
    """Add λ times the penalty's gradient to that of factors, pairs of A (r, d_in), B (d_out, r).

    Called with one factor it presses that one; both of a pair by what they are before either moves.
    """

    def __init__(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], pruning: Pruning | None
    ) -> None:
        self._pairs = pairs if pruning is not None and pruning.enabled else []
        self._pair_of = {id(factor): pair for pair in self._pairs for factor in pair}
        self._beside: dict[int, torch.Tensor | None] = {}
        """What the other factor of a pair is to get."""
        if pruning is not None and self._pairs:
            self._penalty = pruning.penalty
            rank = max(a.shape[0] for a, _ in pairs)
            self._head = head_rank(rank, pruning.gamma, pruning.rank_min)

    def begin(self) -> None:
        """Begin with gradients of other factors than before."""
        self._beside.clear()

    def all(self) -> None:
        """Press all factors that have a gradient."""
        self.begin()
        for pair in self._pairs:
            for factor in pair:
                self(factor)

    @torch.no_grad()
    def __call__(self, factor: torch.Tensor) -> None:
        if factor.grad is None or id(factor) not in self._pair_of:
            return
        a, b = self._pair_of[id(factor)]
        if id(factor) not in self._beside:
            found = penalty_gradient(a.detach().numpy(), b.detach().numpy(), self._head)
            for each, gradient in zip((a, b), found or (None, None), strict=True):
                if each.requires_grad:
                    self._beside[id(each)] = (
                        None if gradient is None else torch.from_numpy(gradient)
                    )
        mine = self._beside.pop(id(factor))
        if mine is not None:
            tail = factor.grad[self._head :] if factor is a else factor.grad[:, self._head :]
            tail.add_(mine, alpha=self._penalty)
