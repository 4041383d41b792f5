"""Write what a benchmark found: a table for people, `runs/bench/NAME.json` for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

FOLDER = Path("runs/bench")


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, what was measured for it, and whether that meets the target."""

    claim: str
    value: float | str | None
    target: str
    met: bool


def write_claims(name: str, claims: Sequence[Claim], **details: object) -> None:
    """Print the claims and write them, with details, to `runs/bench/NAME.json`."""
    table = Table(title=name, title_justify="left")
    for heading in ("claim", "value", "target", "met"):
        table.add_column(heading)
    for claim in claims:
        value = f"{claim.value:.4g}" if isinstance(claim.value, float) else str(claim.value)
        table.add_row(claim.claim, value, claim.target, "yes" if claim.met else "no")
    Console().print(table)
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = {"claims": [asdict(claim) for claim in claims], **details}
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
