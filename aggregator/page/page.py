"""What a page is: a title, links, and fragments of HTML that are replaced as they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from markupsafe import Markup

from aggregator.page.render import render


@dataclass(frozen=True, slots=True)
class Link:
    """One entry of a page's navigation."""

    text: str
    href: str
    current: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Hold a page of one moment. A fragment with nothing in it now may have something later."""

    title: str
    fragments: Mapping[str, Markup]
    """Id → what is in it, in the order of the page."""
    links: tuple[Link, ...] = ()
    status: int = field(default=200)


def html_of(page: Page, *, session: bool = False) -> str:
    """Return a page as a whole; one that is seen in a `session` has a way out of it."""
    return render("shell.html", page=page, session=session)


def sorry(status: int, headline: str, why: str) -> Page:
    """Return the page that says what there is not."""
    head = render("sorry.html", status=status, headline=headline, why=why)
    return Page(f"Tunefleet: {headline}", {"head": head}, status=status)
