"""Rounds and versions, as a store's database has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from aggregator.view.database import ReadOnly
from aggregator.view.models import RoundDevice, RoundView, Totals, VersionView

_ROUNDS = """
WITH numbers AS (
  SELECT round AS n FROM times UNION SELECT number FROM rounds),
some AS (SELECT n FROM numbers WHERE {which} ORDER BY n DESC LIMIT :limit),
sums AS (
  SELECT round, count(*) AS counted, sum(up_bytes) AS up, sum(down_bytes) AS down, avg(loss) AS loss
  FROM counted WHERE round IN (SELECT n FROM some) GROUP BY round)
SELECT n, r.version, t.opened, t.merged, coalesce(t.note, ''), r.seconds, s.loss,
  coalesce(s.counted, 0), (SELECT count(*) FROM refused f WHERE f.round = n),
  coalesce(s.up, 0), coalesce(s.down, 0), r.residual, {weights}
FROM some LEFT JOIN rounds r ON r.number = n LEFT JOIN times t ON t.round = n
  LEFT JOIN sums s ON s.round = n ORDER BY n DESC
"""


def page(db: ReadOnly, before: int | None, limit: int) -> list[RoundView]:
    """Return rounds below a number, the newest first."""
    which = "1" if before is None else "n < :number"
    return _rounds(db, which, "'{}'", number=before, limit=limit)


def one(db: ReadOnly, number: int) -> RoundView | None:
    """Return one round, with its shares."""
    return next(iter(_rounds(db, "n = :number", "r.weights", number=number, limit=1)), None)


def _rounds(
    db: ReadOnly, which: str, weights: str, *, number: int | None, limit: int
) -> list[RoundView]:
    query = _ROUNDS.format(which=which, weights=weights)
    found = db.rows(query, {"number": number, "limit": limit})
    if not found:
        return []
    ranks: dict[int, dict[int, int]] = {}
    for round_number, rank, devices in db.rows(
        "SELECT round, rank, count(*) FROM counted WHERE round BETWEEN ? AND ? "
        "GROUP BY round, rank ORDER BY round, rank",
        [found[-1][0], found[0][0]],
    ):
        ranks.setdefault(round_number, {})[rank] = devices
    return [_round(row, ranks.get(row[0], {})) for row in found]


def _round(row: Any, ranks: dict[int, int]) -> RoundView:
    return RoundView(
        number=row[0],
        version=row[1],
        opened=row[2],
        ended=row[3],
        note=row[4],
        merge_s=row[5],
        loss=row[6],
        counted=row[7],
        refused=row[8],
        ranks=ranks,
        up_bytes=row[9],
        down_bytes=row[10],
        residual=row[11],
        weights=json.loads(row[12] or "{}"),
    )


_DONE = """
WITH who AS (
  SELECT round, device FROM counted WHERE {which} UNION SELECT round, device FROM refused
  WHERE {which})
SELECT who.round, who.device, c.rank IS NOT NULL, coalesce(c.rank, 0), coalesce(c.held, 0),
  coalesce(c.up_bytes, 0), coalesce(c.down_bytes, 0), c.loss, coalesce(f.times, 0),
  coalesce(f.reason, ''), max(coalesce(c.at, 0), coalesce(f.at, 0))
FROM who LEFT JOIN counted c ON c.round = who.round AND c.device = who.device
  LEFT JOIN refused f ON f.round = who.round AND f.device = who.device
ORDER BY {order} LIMIT :limit OFFSET :offset
"""


def devices(db: ReadOnly, number: int, offset: int, limit: int) -> list[RoundDevice]:
    """Return what devices did in a round, in the order of their names."""
    query = _DONE.format(which="round = :round", order="who.device")
    return _done(db, query, {"round": number, "offset": offset, "limit": limit})


def of_device(db: ReadOnly, device: str, limit: int) -> list[RoundDevice]:
    """Return what a device did in rounds, the newest first."""
    query = _DONE.format(which="device = :device", order="who.round DESC")
    return _done(db, query, {"device": device, "offset": 0, "limit": limit})


def _done(db: ReadOnly, query: str, values: dict[str, object]) -> list[RoundDevice]:
    found = db.rows(query, values)
    return [RoundDevice(row[0], row[1], bool(row[2]), *row[3:]) for row in found]


def versions(db: ReadOnly) -> list[VersionView]:
    """Return the versions that are kept, the newest first."""
    found = db.rows(
        """SELECT v.version, json_extract(manifest, '$.parent'),
          json_extract(manifest, '$.encoding'),
          (SELECT coalesce(sum(bytes), 0) FROM band_sizes b WHERE b.version = v.version),
          (SELECT count(*) FROM issued i WHERE i.kind = 'personal' AND i.version = v.version)
        FROM versions v ORDER BY v.version DESC"""
    )
    return [VersionView(*row) for row in found]


def loss_spread(db: ReadOnly, number: int) -> tuple[float, float] | None:
    """Return between what the middle 80 % of a round's losses are; None where there is none."""
    losses = [
        loss
        for (loss,) in db.rows(
            "SELECT loss FROM counted WHERE round = ? AND loss NOT NULL ORDER BY loss", [number]
        )
    ]
    if not losses:
        return None
    return losses[len(losses) // 10], losses[-1 - len(losses) // 10]


def device_losses(db: ReadOnly, numbers: Sequence[int], few: int) -> dict[str, list[float | None]]:
    """Return the losses of each device in these rounds; nothing where more than `few` told any."""
    first, last = min(numbers), max(numbers)
    rows = db.rows(
        "SELECT device, round, loss FROM counted WHERE round BETWEEN ? AND ? AND loss NOT NULL "
        "AND (SELECT count(*) FROM (SELECT DISTINCT device FROM counted WHERE round BETWEEN ? "
        "AND ? AND loss NOT NULL LIMIT ?)) <= ? ORDER BY device",
        [first, last, first, last, few + 1, few],
    )
    at = {number: place for place, number in enumerate(numbers)}
    found: dict[str, list[float | None]] = {}
    for device, number, loss in rows:
        if number in at:
            found.setdefault(device, [None] * len(numbers))[at[number]] = loss
    return found


def totals(db: ReadOnly, bounds_s: Sequence[float]) -> Totals:
    """Return what has come so far, and how many merges took how long."""
    within = "".join(f", coalesce(sum(seconds <= {bound:g}), 0)" for bound in bounds_s)
    seconds, *merges = db.one(f"SELECT coalesce(sum(seconds), 0){within}, count(*) FROM rounds")
    return Totals(
        counted=db.one("SELECT count(*) FROM counted")[0],
        refused=db.one("SELECT coalesce(sum(times), 0) FROM refused")[0],
        merge_s=seconds,
        merges_within=tuple(merges),
    )
