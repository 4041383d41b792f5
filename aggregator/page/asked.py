"""Which devices a page is to list, by what its address says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlencode

ORDERS = {
    "name": "by name",
    "state": "by state",
    "rank": "largest rank first",
    "seen": "latest news first",
    "up": "most sent first",
    "round": "last counted first",
}
"""Order of a view → how the page calls it."""
DESCENDING = ("rank", "seen", "up", "round")
PER_PAGE = 50
PAGE_MAX = 1_000_000
SEARCH = 63


@dataclass(frozen=True, slots=True)
class Asked:
    """A page of the list of devices."""

    state: str = ""
    search: str = ""
    order: str = "name"
    page: int = 1

    @classmethod
    def read(cls, query: Mapping[str, str]) -> Asked:
        """Return what an address asks for; what makes no sense is left out."""
        page, order = query.get("page", "1"), query.get("order", "name")
        return cls(
            query.get("state", "")[:SEARCH],
            query.get("search", "").strip()[:SEARCH],
            order if order in ORDERS else "name",
            min(max(int(page), 1), PAGE_MAX) if page.isascii() and page.isdigit() else 1,
        )

    def view(self) -> dict[str, Any]:
        """Return the arguments of `StateView.devices`."""
        return {
            "state": self.state,
            "search": self.search,
            "order": self.order,
            "descending": self.order in DESCENDING,
            "offset": (self.page - 1) * PER_PAGE,
            "limit": PER_PAGE,
        }

    def link(self, **changes: Any) -> str:
        """Return the address with something changed; another choice begins at the first page."""
        asked = replace(self, **{"page": 1, **changes})
        said = {name: value for name, value in asdict(asked).items() if value != DEFAULT[name]}
        return f"?{urlencode(said)}#devices"


DEFAULT = asdict(Asked())
