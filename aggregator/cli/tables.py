"""Tables: drawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text; columns whose name ends in a space stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def show(self) -> None:
        """Print it."""
        if sys.stdout.isatty():
            self._draw()
            return
        for line in self.lines():
            print(line)

    def lines(self) -> list[str]:
        """Return it as lines, columns two spaces apart; no title, so that programs can cut it."""
        cells = [[name.strip() for name in self.columns], *self.rows]
        widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
        return [
            "  ".join(
                cell.rjust(width) if name.endswith(" ") else cell.ljust(width)
                for cell, width, name in zip(row, widths, self.columns, strict=True)
            ).rstrip()
            for row in cells
        ]

    def _draw(self) -> None:
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(title=self.title or None, title_justify="left")
        for name in self.columns:
            right = name.endswith(" ")
            drawn.add_column(name.strip(), justify="right" if right else "left")
        for row in self.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console(markup=False).print(drawn)
