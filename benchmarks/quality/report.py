"""Tables, claims and pictures of what is in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim, write_claims
from benchmarks.quality.arms import ARMS, DEFAULT, LARGEST, PERSONAL, Result
from benchmarks.quality.paired import Comparison, compare, interval

PUBLISHED_RULES = ("fedavg", "hetlora", "flexlora")
BOUND_PERCENT = 3.0
LOCAL = "local only"
TABLES = "tables.md"
Found = Mapping[str, Mapping[int, tuple[float, Result]]]
"""Arm → seed → learning rate and result."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """Hold the results of one dataset on one model."""

    dataset: str
    model: str
    found: Found

    def losses(self, arm: str) -> dict[int, float]:
        """Return an arm's held-out loss by seed."""
        return {seed: result.held_out for seed, (_, result) in self.found.get(arm, {}).items()}

    def against(self, arm: str, other: str) -> Comparison | None:
        """Compare two arms over the seeds of both."""
        return compare(self.losses(arm), self.losses(other))

    def best(self, kind: str, steps: str) -> str | None:
        """Return the usual arm of a kind and so many steps with the least loss on the trust splits.

        Over the seeds that all its arms have, so that none gains by an easier seed.
        """
        arms = [a for a in self.found if ARMS[a].kind == kind and ARMS[a].is_usual]
        arms = [a for a in arms if ARMS[a].steps == steps]
        seeds = set.intersection(*(set(self.found[arm]) for arm in arms)) if arms else set()
        if not seeds:
            return None
        return min(arms, key=lambda arm: sum(self.found[arm][seed][1].trust for seed in seeds))

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a line of the table for each arm: best last."""
        arms = [arm for arm in ARMS if arm in self.found]
        for arm in arms:
            loss = interval(self.losses(arm))
            rates = sorted({rate for rate, _ in self.found[arm].values()})
            others = (
                None if arm == other else self.against(arm, other)
                for other in (DEFAULT, LOCAL, LARGEST)
            )
            yield (
                arm,
                str(loss),
                *(str(other) if other else "" for other in others),
                str(loss.count),
                " ".join(f"{rate:g}" for rate in rates) if ARMS[arm].kind != "base" else "",
            )


HEADINGS = (
    "arm",
    "held-out loss",
    "to the default",
    "to local only",
    "to the bound",
    "seeds",
    "rate",
)


def show(sheets: Sequence[Sheet]) -> None:
    """Print a table for each sheet, and write the claims."""
    for sheet in sheets:
        table = Table(title=f"{sheet.dataset}, {sheet.model}", title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading)
        for row in sheet.rows():
            table.add_row(*row)
        Console(width=150).print(table)
    write_claims(
        "quality-data",
        [claim for sheet in sheets for claim in claims(sheet)],
        tables={f"{s.dataset} {s.model}": [HEADINGS, *s.rows()] for s in sheets},
    )


TITLE = """# Rules on real text: tables

Written by `python -m benchmarks.quality --data DIR --published docs/quality --report --out
docs/quality` from the runs of [runs.json](runs.json). What the arms are is in
`benchmarks/quality/arms.py`, what follows from them in [results.md](../results.md), what was run
before single runs were kept in [earlier.md](earlier.md). Losses
are nats a token on held-out text, means over devices and seeds with their 95 % t-interval. "To the
default" and so on: by how much the arm is above it over the seeds of both, with the interval of the
paired difference and in how many of the seeds the arm is below.
"""


def as_markdown(sheets: Sequence[Sheet]) -> str:
    """Return the tables as a page of the docs."""
    parts = []
    for sheet in sheets:
        lines = [HEADINGS, ["---"] * len(HEADINGS), *sheet.rows()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"### {sheet.dataset}, {sheet.model}\n\n{table}\n")
    return "\n".join((TITLE, *parts))


def lost_rows(sheets: Sequence[Sheet], folder: Path) -> list[str]:
    """Return the rows of a folder's tables that are not among those of the sheets."""
    try:
        before = (folder / TABLES).read_text()
    except FileNotFoundError:
        return []
    kept = set(_rows(as_markdown(sheets)))
    return [row for row in _rows(before) if row not in kept]


def _rows(page: str) -> Iterator[str]:
    """Yield each row of a page of tables: its arm, and what the table is of."""
    title = ""
    for line in page.splitlines():
        if line.startswith("### "):
            title = line.removeprefix("### ")
        elif line.startswith("| "):
            arm = line.split("|")[1].strip()
            if arm not in (HEADINGS[0], "---"):
                yield f"{arm} ({title})"


def claims(sheet: Sheet) -> Iterator[Claim]:
    """Yield what the project claims of a sheet, as far as its arms were run."""
    where = f"{sheet.dataset}, {sheet.model}: "
    for rule in PUBLISHED_RULES:
        found = sheet.against(DEFAULT, rule)
        if found:
            yield _claim(f"{where}default against {rule}", found, "< 0 %", found.percent < 0)
    bound = sheet.against(DEFAULT, LARGEST)
    if bound:
        target = f"< {BOUND_PERCENT:g} %"
        met = bound.percent < BOUND_PERCENT
        yield _claim(f"{where}default against all at the largest rank", bound, target, met)
    for steps in ("as many", "twice as many"):
        personal = sheet.best("personal", steps)
        for other in (sheet.best("alone", steps), sheet.best("common", steps)):
            found = sheet.against(personal, other) if personal and other else None
            if found:
                claim = f"{where}best personal ({personal}) against {other}"
                yield _claim(claim, found, "< 0 %", found.percent < 0)


def _claim(claim: str, found: Comparison, target: str, met: bool) -> Claim:
    return Claim(claim, str(found), target, met)


CURVES = (LOCAL, "hetlora", "flexlora", DEFAULT, LARGEST, PERSONAL)


def write(sheets: Sequence[Sheet], folder: Path) -> None:
    """Write the tables as markdown and a picture for each sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLES).write_text(as_markdown(sheets))
    for sheet in (sheet for sheet in sheets if not sheet.found.keys().isdisjoint(CURVES)):
        draw(sheet, folder / f"{sheet.dataset}-{sheet.model}.svg")


def draw(sheet: Sheet, path: Path) -> None:
    """Draw the loss by round on the trust splits, a mean over seeds, as an SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "tunefleet"  # the same numbers give the same file
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for arm in (arm for arm in CURVES if arm in sheet.found):
        curves = [result.curve for _, result in sheet.found[arm].values()]
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, label=arm, marker=".")
    axes.set(xlabel="round", ylabel="nats a token", title=f"{sheet.dataset}, {sheet.model}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
