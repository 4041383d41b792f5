"""A large fleet at a glance: how every device is, and why those wait that do."""

from __future__ import annotations

from collections import Counter

from aggregator.view.database import ReadOnly
from aggregator.view.devices import STATE_SQL, Where
from aggregator.view.models import Crowd
from aggregator.view.words import Standing, device_waits_for
from protocol.cohort import in_cohort

LETTERS = {
    "training": "t", "uploading": "u", "downloading": "d", "idle": "i", "planning": "p",
    "waiting": "w", "unfit": "x", "stopped": "s", "offline": "o", "quarantined": "q",
}  # fmt: skip
REASONS = 40
"""Different reasons that are told, the most frequent ones."""
_QUERY = f"""
SELECT d.name, {STATE_SQL}, coalesce(json_extract(d.status, '$.detail'), ''),
  EXISTS (SELECT 1 FROM conduct c WHERE c.device = d.name AND c.quarantine > :now),
  EXISTS (SELECT 1 FROM counted c WHERE c.round = :round AND c.device = d.name
    AND (c.trained = :round OR NOT :buffered)), {{revoked}}
FROM devices d ORDER BY d.name
"""
_REVOKED = "EXISTS (SELECT 1 FROM fleet.devices f WHERE f.name = d.name AND f.revoked NOT NULL)"


def crowd(db: ReadOnly, where: Where, now: float) -> Crowd:
    """Return a letter for each device, in the order of their names, and how many wait for what."""
    query = _QUERY.format(revoked=_REVOKED if db.has_registry else "0")
    buffered = where.policy.buffer > 0
    found = db.rows(query, {"now": now, "round": where.state.number, "buffered": buffered})
    share = where.policy.share(where.state.attempt)
    is_paused = where.steering.paused is not None
    letters: list[str] = []
    reasons: Counter[str] = Counter()
    told: dict[Standing, str] = {}
    for name, state, detail, is_out, delivered, revoked in found:
        letters.append("q" if is_out else LETTERS.get(state, "?"))
        standing = Standing(
            online=state != "offline",
            state=state,
            detail=detail,
            revoked=bool(revoked),
            quarantined=bool(is_out),
            drawn=share >= 1 or in_cohort(name, where.job, where.state.number, share),
            delivered=bool(delivered) and where.state.state == "open",
        )
        if standing not in told:  # few differ
            told[standing] = device_waits_for(standing, where.state, paused=is_paused)
        reasons[told[standing]] += 1
    del reasons[""]
    return Crowd("".join(letters), dict(reasons.most_common(REASONS)))
