"""The devices of a round, each of which has one vote, however many updates it sent.

In buffered rounds a device may be in a round more than once. What bounds a *device* (how much one
may weigh, how many may be dishonest) must not count it as several: it stands at the mean of its
updates, by their shares, and what it is given falls to them in the same proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.merge.round_view import RoundView
from aggregator.merge.sums import Float64Array


@dataclass(frozen=True, slots=True)
class Voters:
    """Hold the names of D devices, and how a device's share lies on its updates.

    `parts` (K, D) has columns that sum to 1; None where each of the K updates is another device's.
    """

    names: tuple[str, ...]
    parts: Float64Array | None

    def shares(self, of_updates: Float64Array) -> Float64Array:
        """Return the shares of devices (D,) by those of updates (K,)."""
        if self.parts is None:
            return of_updates
        return np.asarray((self.parts > 0).T @ of_updates)

    def of_updates(self, shares: Float64Array) -> Float64Array:
        """Return the shares of updates (K,) by those of devices (D,)."""
        return shares if self.parts is None else np.asarray(self.parts @ shares)

    def gram(self, of_updates: Float64Array) -> Float64Array:
        """Return the products of devices' mean changes (D, D) by those of updates (K, K)."""
        return of_updates if self.parts is None else self.parts.T @ of_updates @ self.parts


def voters_of(view: RoundView, shares: Float64Array) -> Voters:
    """Return the devices of a round, in the order of their first updates.

    Updates of a device that has no share count alike.
    """
    names = tuple(dict.fromkeys(update.device for update in view.updates))
    if len(names) == len(view.updates):
        return Voters(names, None)
    own = np.array([[update.device == name for name in names] for update in view.updates])
    parts = own * shares[:, None]
    parts = np.where(parts.any(axis=0), parts, own)
    return Voters(names, parts / parts.sum(axis=0))
