"""Runs side by side: one row for each set of students and each teacher, one column for each attack."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from distill.report.runs import IncompleteRun

FACTS = {
    "dataset": "data",
    "method": "method",
    "ipc": "IPC",
    "split": "split",
    "students": "students",
    "images": "images",
}
"""Facts of a run and their names; one that is the same in every run stands in the caption instead of a column."""
LOWER_IS_BETTER = ("BN loss",)
RATIOS = ("RR", "I-RR")


@dataclass(frozen=True)
class Cell:
    """A figure with its sample standard deviation and what the paper states for it.

    Accuracies are in per cent; ratios and the batch-norm loss are as they are.
    """

    value: float
    sd: float | None = None
    published: float | None = None
    digits: int = 1

    def text(self, bold: bool = False) -> str:
        """``97.3 ± 0.2 (paper 57.9)``; the measured part in Markdown's bold on request."""
        spread = "" if self.sd is None else f" ± {self.sd:.{self.digits}f}"
        beside = "" if self.published is None else f" (paper {self.published:g})"
        stars = "**" if bold else ""
        return f"{stars}{self.value:.{self.digits}f}{spread}{stars}{beside}"


@dataclass(frozen=True)
class Row:
    """One network or set of students: who it is, and its figures by column."""

    run: str
    regularizer: str
    network: str
    facts: dict[str, Any]
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Comparison:
    """A table of runs, with a caption and remarks, for the terminal, Markdown and CSV."""

    rows: list[Row]
    remarks: list[str]
    incomplete: list[IncompleteRun]

    @property
    def caption(self) -> str:
        """What is the same in every row, and how to read the cells."""
        if not self.rows:
            return "No finished run."
        constant = [f"{FACTS[key]} {self.rows[0].facts[key]}" for key in FACTS if key not in self._varying()]
        cells = [cell for row in self.rows for cell in row.cells.values()]
        spread = (
            "; mean ± sample standard deviation over students" if any(cell.sd is not None for cell in cells) else ""
        )
        return f"Accuracy in %{spread}; @ε is the L∞ radius in 1/255; {', '.join(constant)}."

    def terminal(self) -> str:
        """Caption, aligned columns and remarks as plain text."""
        return "\n".join([self.caption, "", self._drawn("simple", bold=False), *self._notes()])

    def markdown(self) -> str:
        """Caption, a pipe table with the best figure of every column in bold, and remarks as a list."""
        notes = [f"- {note}" for note in self._notes()]
        return "\n".join([self.caption, "", self._drawn("pipe", bold=True), *([""] if notes else []), *notes, ""])

    def csv(self) -> str:
        """One line per row; every figure has its column, ``… sd`` and ``… published``."""
        names = self._columns()
        target = io.StringIO()
        writer = csv.writer(target, lineterminator="\n")
        suffixes = ("", " sd", " published")
        writer.writerow(["run", "regularizer", "network", *FACTS.values(), *(n + s for n in names for s in suffixes)])
        for row in self.rows:
            cells = [row.cells.get(name) for name in names]
            figures = [f for c in cells for f in ((c.value, c.sd, c.published) if c else (None, None, None))]
            rounded = [None if figure is None else round(figure, 6) for figure in figures]
            writer.writerow([row.run, row.regularizer, row.network, *(row.facts[key] for key in FACTS), *rounded])
        return target.getvalue()

    def _notes(self) -> list[str]:
        return [*self.remarks, *map(str, self.incomplete)]

    def _columns(self) -> list[str]:
        """Clean, the attacks in the order of their first mention, then ratios and the batch-norm loss."""
        found = dict.fromkeys(name for row in self.rows for name in row.cells)
        last = [*RATIOS, *LOWER_IS_BETTER]
        return [name for name in found if name not in last] + [name for name in last if name in found]

    def _varying(self) -> list[str]:
        students = [row for row in self.rows if row.network == "student"]
        return [key for key in FACTS if len({str(row.facts[key]) for row in students}) > 1]

    def _drawn(self, style: str, bold: bool) -> str:
        if not self.rows:
            return ""
        names, varying = self._columns(), self._varying()
        body = []
        for row in self.rows:
            texts = [self._text(row, name, bold) for name in names]
            body.append([row.run, row.regularizer, row.network, *(str(row.facts[key]) for key in varying), *texts])
        headers = ["run", "regularizer", "network", *(FACTS[key] for key in varying), *names]
        left = 3 + len(varying)
        align = ["left"] * left + ["right"] * len(names)
        return str(tabulate(body, headers, tablefmt=style, colalign=align, disable_numparse=True))

    def _text(self, row: Row, name: str, bold: bool) -> str:
        cell = row.cells.get(name)
        if cell is None:
            return "–"
        peers = [r.cells[name].value for r in self.rows if r.network == row.network and name in r.cells]
        best = min(peers) if name in LOWER_IS_BETTER else max(peers)
        return cell.text(bold=bold and len(peers) > 1 and cell.value == best)
