"""From views to HTML: the templates, and how they write times, sizes and states."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from protocol.human import human_bytes, human_seconds

HERE = Path(__file__).parent
NONE = "\N{EN DASH}"
STATES = (
    "training", "uploading", "downloading", "idle", "planning", "waiting", "unfit", "stopped",
    "offline",
)  # fmt: skip
"""In the order of the page: who works first, who is away last. Their colours are page.css's."""


@lru_cache(maxsize=1)
def templates() -> Environment:
    """Return the page's templates; what is put into them is escaped."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "bytes": _bytes,
        "seconds": _seconds,
        "loss": loss_words,
        "count": lambda number: f"{number:,}",
        "when": when,
        "or_none": lambda value: NONE if value in (None, "") else value,
        "query": urlencode,
    }
    made.globals |= {"STATES": STATES, "NONE": NONE}
    return made


def render(template: str, **values: object) -> Markup:
    """Return a template filled in."""
    return Markup(templates().get_template(template).render(**values))


def loss_words(value: float | None) -> str:
    """Return a loss in nats a token with three decimals."""
    return NONE if value is None else f"{value:.3f}"


def when(at: float | None) -> Markup:
    """Return a time, in seconds since 1970, that the page's script goes on telling as an age."""
    if at is None:
        return Markup(NONE)
    then = datetime.fromtimestamp(at, timezone.utc)
    iso = then.isoformat(timespec="seconds").replace("+00:00", "Z")
    shown = escape(f"{then:%d %b %H:%M:%S} UTC")
    return Markup(f'<time datetime="{iso}" title="{shown}">{shown}</time>')


def _bytes(count: float | None) -> str:
    return NONE if count is None else human_bytes(count)


def _seconds(value: float | None) -> str:
    return NONE if value is None else human_seconds(value)
