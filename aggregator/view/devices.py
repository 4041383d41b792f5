"""Devices as a store's database has them: counted by SQL, read by the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aggregator.devices import NOT_READY
from aggregator.rounds import Policy, RoundState
from aggregator.steering import Steering
from aggregator.view import rounds
from aggregator.view.database import ReadOnly
from aggregator.view.models import DeviceCounts, DeviceDetail, DeviceView, PlanView
from aggregator.view.words import Standing, device_waits_for
from protocol.cohort import in_cohort
from protocol.errors import ProtocolError
from protocol.layers import from_bitmap
from protocol.messages import UploadManifest

_ONLINE = "json_extract(status, '$.online')"
STATE_SQL = f"CASE WHEN {_ONLINE} THEN json_extract(status, '$.state') ELSE 'offline' END"
_OUT = "name IN (SELECT device FROM conduct WHERE quarantine > :now)"
ORDERS: Mapping[str, str] = {
    "name": "name",
    "state": STATE_SQL,
    "rank": "json_extract(status, '$.rank')",
    "seen": "(SELECT last FROM heard WHERE device = name)",
    "up": "(SELECT sum(up_bytes) FROM counted WHERE device = name)",
    "round": "(SELECT max(round) FROM counted WHERE device = name)",
}
"""What a page of devices may be in the order of."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where the job stands that devices are looked at in."""

    job: str
    state: RoundState
    policy: Policy
    steering: Steering


@dataclass(frozen=True, slots=True)
class Page:
    """Which devices are asked for."""

    state: str
    search: str
    order: str
    descending: bool
    offset: int
    limit: int


def counts(db: ReadOnly, now: float) -> DeviceCounts:
    """Return how many devices are how."""
    by_state = dict(
        db.rows(f"SELECT {STATE_SQL} AS s, count(*) FROM devices GROUP BY s ORDER BY s")
    )
    known = sum(by_state.values())
    out = db.one(f"SELECT count(*) FROM devices WHERE {_OUT}", {"now": now})[0]
    return DeviceCounts(
        known=known,
        online=known - by_state.get("offline", 0),
        ready=len(ready(db, now)),
        by_state=by_state,
        quarantined=out,
    )


def count(db: ReadOnly, asked: Page, now: float) -> int:
    """Return how many devices are asked for, on all pages."""
    conditions, values = _conditions(asked)
    found = db.one(f"SELECT count(*) FROM devices WHERE {conditions}", {**values, "now": now})
    return int(found[0])


def ready(db: ReadOnly, now: float) -> set[str]:
    """Return the devices that may take part now."""
    waiting = ", ".join(f"'{state}'" for state in ("offline", *NOT_READY))
    member = "AND name IN (SELECT name FROM fleet.devices WHERE revoked IS NULL)"
    query = f"SELECT name FROM devices WHERE {STATE_SQL} NOT IN ({waiting}) AND NOT {_OUT}"
    return {row[0] for row in db.rows(query + member * db.has_registry, {"now": now})}


def page(db: ReadOnly, where: Where, asked: Page, now: float) -> list[DeviceView]:
    """Return a page of the devices.

    Raises:
        ValueError: there is no such order.
    """
    if asked.order not in ORDERS:
        raise ValueError(f"{asked.order!r} is no order of devices; there are {', '.join(ORDERS)}")
    order = f"{ORDERS[asked.order]} {'DESC' if asked.descending else 'ASC'}, name"
    conditions, values = _conditions(asked)
    which = f"WHERE {conditions} ORDER BY {order} LIMIT :limit OFFSET :offset"
    return _devices(db, where, which, {**values, "limit": asked.limit, "offset": asked.offset}, now)


def _conditions(asked: Page) -> tuple[str, dict[str, object]]:
    """Return what is true of the devices that are asked for, in SQL, and its values."""
    conditions = ["1"]
    if asked.state == "quarantined":
        conditions.append(_OUT)
    elif asked.state == "online":
        conditions.append(_ONLINE)
    elif asked.state:
        conditions.append(f"{STATE_SQL} = :state")
    if asked.search:
        conditions.append("instr(name, :search)")
    return " AND ".join(conditions), {"state": asked.state, "search": asked.search}


def one(db: ReadOnly, where: Where, name: str, now: float) -> DeviceView | None:
    """Return a device; None where there is none of that name."""
    return next(iter(_devices(db, where, "WHERE name = :name", {"name": name}, now)), None)


def _devices(
    db: ReadOnly, where: Where, which: str, values: dict[str, object], now: float
) -> list[DeviceView]:
    revoked = "EXISTS (SELECT 1 FROM fleet.devices f WHERE f.name = d.name AND f.revoked NOT NULL)"
    query = f"""WITH d AS MATERIALIZED (SELECT * FROM devices {which})
    SELECT d.name, d.status,
      (SELECT last FROM heard WHERE device = d.name),
      (SELECT max(round) FROM counted WHERE device = d.name),
      (SELECT coalesce(sum(up_bytes), 0) FROM counted WHERE device = d.name),
      (SELECT coalesce(sum(down_bytes), 0) FROM counted WHERE device = d.name),
      (SELECT count(*) FROM counted WHERE device = d.name),
      coalesce((SELECT reason FROM refused f WHERE f.device = d.name AND f.at > coalesce(
        (SELECT max(at) FROM counted c WHERE c.device = d.name), 0)
        ORDER BY round DESC LIMIT 1), ''),
      (SELECT quarantine FROM conduct WHERE device = d.name AND quarantine > :now),
      coalesce((SELECT strikes FROM conduct WHERE device = d.name), 0),
      EXISTS (SELECT 1 FROM counted WHERE device = d.name AND round = :round
        AND (trained = :round OR NOT :buffered)),
      {revoked if db.has_registry else "0"}
    FROM d"""
    round_number = where.state.number
    buffered = where.policy.buffer > 0
    found = db.rows(query, {**values, "now": now, "round": round_number, "buffered": buffered})
    return [_device(row, where) for row in found]


def _device(row: Any, where: Where) -> DeviceView:
    name, status, seen, last, up, down, times, error, until, strikes, delivered, revoked = row
    told = json.loads(status)
    share = where.policy.share(where.state.attempt)
    standing = Standing(
        online=told["online"],
        state=told.get("state", "idle"),
        detail=told.get("detail", ""),
        revoked=bool(revoked),
        quarantined=until is not None,
        drawn=in_cohort(name, where.job, where.state.number, share),
        delivered=bool(delivered) and where.state.state == "open",
    )
    return DeviceView(
        name=name,
        online=standing.online,
        state=standing.state,
        profile=told.get("profile", ""),
        rank=told.get("rank", 0),
        version=told.get("version"),
        detail=standing.detail,
        waiting_for=device_waits_for(
            standing, where.state, paused=where.steering.paused is not None
        ),
        last_seen=seen,
        last_round=last,
        up_bytes=up,
        down_bytes=down,
        rounds=times,
        last_error=error,
        quarantined_until=until,
        strikes=strikes,
        revoked=standing.revoked,
    )


def detail(
    db: ReadOnly, device: DeviceView, modules: Mapping[str, Any], rounds_shown: int
) -> DeviceDetail:
    """Return a device's page."""
    key = db.one("SELECT public_key FROM devices WHERE name = ?", [device.name])
    last = db.one(
        "SELECT manifest FROM uploads WHERE device = ? AND state = 'counted' "
        "ORDER BY round DESC LIMIT 1",
        [device.name],
    )
    plan = _plan(UploadManifest.model_validate_json(last[0]), modules) if last else None
    history = rounds.of_device(db, device.name, rounds_shown)
    return DeviceDetail(device, plan, key[0], tuple(history))


def _plan(manifest: UploadManifest, modules: Mapping[str, Any]) -> PlanView:
    trained = len(modules)
    if manifest.modules is not None:
        try:
            trained = len(from_bitmap(modules, manifest.modules))
        except ProtocolError:  # it was checked before it counted
            trained = 0
    return PlanView(
        round=manifest.round,
        rank=manifest.rank,
        rank_trained=manifest.rank_trained,
        held=manifest.held,
        modules=trained,
        of_modules=len(modules),
        encoding=manifest.encoding,
        examples=manifest.examples,
        bytes=manifest.file.bytes,
        metrics=dict(manifest.metrics),
    )
