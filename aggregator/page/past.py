"""What does not change any more: rounds that have ended, and what was drawn of them.

The page is asked every second while somebody looks at it; of a job with many devices and rounds
only what is new is read and drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from aggregator.issued import TrustMatrix
from aggregator.view import JobView, RoundView, StateView

Spread = tuple[float, float]
ROUNDS = 120
"""Rounds that a page shows, the newest."""


class Past:
    """Remember it, for one reader's thread."""

    def __init__(self) -> None:
        self._ended: dict[str, list[RoundView]] = {}
        """Job → its rounds that have ended, ascending, at most `ROUNDS`."""
        self._spreads: dict[tuple[str, int], Spread | None] = {}
        self._drawn: dict[str, tuple[list[RoundView], Markup]] = {}
        self._trust: dict[str, tuple[int, TrustMatrix]] = {}
        self._maps: dict[str, tuple[int, Markup]] = {}

    def rounds(self, state: StateView, job: JobView) -> list[RoundView]:
        """Return a job's last rounds, ascending; those that have ended are read once."""
        known = self._ended.get(job.name, [])
        last = known[-1].number if known else 0
        new = max(1, min(ROUNDS, job.round - last + 1))
        found = [view for view in reversed(state.rounds(limit=new)) if view.number > last]
        ended = [view for view in found if view.ended is not None]
        # What ended long ago was read with what it still lacked, if a round before it was open.
        self._ended[job.name] = [*known, *ended][-ROUNDS:]
        return [*known, *found][-ROUNDS:]

    def spreads(
        self, state: StateView, job: str, rounds: Sequence[RoundView]
    ) -> list[Spread | None]:
        """Return between what most losses of each round are; of those that have ended once."""
        kept = {}
        for view in rounds:
            place = (job, view.number)
            known = place in self._spreads and view.ended is not None
            kept[place] = self._spreads[place] if known else state.loss_spread(view.number)
        self._spreads = {**{p: s for p, s in self._spreads.items() if p[0] != job}, **kept}
        return [*kept.values()]

    def drawn(self, job: str, rounds: Sequence[RoundView], draw: Callable[[], Markup]) -> Markup:
        """Return what is drawn of rounds, drawn again when one of them has changed."""
        known = self._drawn.get(job)
        if known is None or known[0] != list(rounds):
            known = self._drawn[job] = list(rounds), draw()
        return known[1]

    def trust(self, state: StateView, job: str, number: int) -> TrustMatrix:
        """Return the trust matrix of a round, which is there."""
        known = self._trust.get(job)
        if known is None or known[0] != number:
            matrix = state.trust(number)
            assert matrix is not None, "the view has named the round"
            known = self._trust[job] = number, matrix
        return known[1]

    def map_of(self, job: str, number: int, draw: Callable[[], Markup]) -> Markup:
        """Return the map that is drawn of a round's trust."""
        known = self._maps.get(job)
        if known is None or known[0] != number:
            known = self._maps[job] = number, draw()
        return known[1]
