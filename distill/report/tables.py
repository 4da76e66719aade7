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

    Attributes:
        few: ``2 of 3`` where the figure is not that of every network or run: a ratio may not be defined for some.
    """

    value: float
    sd: float | None = None
    published: float | None = None
    digits: int = 1
    few: str = ""

    @property
    def measured(self) -> str:
        """``97.3 ± 0.2``, or ``97.3 ± 0.2 (2 of 3)``."""
        spread = "" if self.sd is None else f" ± {self.sd:.{self.digits}f}"
        return f"{self.value:.{self.digits}f}{spread}{f' ({self.few})' if self.few else ''}"

    def text(self, bold: bool = False) -> str:
        """``97.3 ± 0.2 (paper 57.9)``; the measured part in Markdown's bold on request."""
        beside = "" if self.published is None else f" (paper {self.published:g})"
        stars = "**" if bold else ""
        return f"{stars}{self.measured}{stars}{beside}"


@dataclass(frozen=True)
class Row:
    """One network or set of students: who it is, and its figures by column.

    Attributes:
        run: the run, or repetitions of one, for people.
        network: ``student`` or ``teacher``.
        runs: how many runs stand behind the figures.
        passes: forward and backward passes that all attacks together spent on each attacked image.
        flags: what looks like gradient masking, one sentence each; None where nobody has looked.
        name: of the run without the number of repetitions.
    """

    run: str
    regularizer: str
    network: str
    facts: dict[str, Any]
    cells: dict[str, Cell]
    runs: int = 1
    passes: tuple[float, float] | None = None
    flags: list[str] | None = None
    name: str = ""

    @property
    def passes_text(self) -> str:
        """``1,240 / 1,200``."""
        return " / ".join(f"{number:,.0f}" for number in self.passes) if self.passes else "–"

    @property
    def flags_text(self) -> str:
        """How many flags, ``none``, or a dash where nobody has looked."""
        return "–" if self.flags is None else str(len(self.flags) or "none")


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
        constant = [f"{FACTS[key]} {self.rows[0].facts[key]}" for key in FACTS if key not in self.varying()]
        spreads = {
            "runs" if row.runs > 1 else "students"
            for row in self.rows
            if any(cell.sd is not None for cell in row.cells.values())
        }
        over = " or, of a single run, ".join(f"over {what}" for what in sorted(spreads))
        parts = ["Accuracy in %", f"mean ± sample standard deviation {over}" if over else "", self._radii()]
        parts.append("passes: forward / backward per attacked image" if self._known("passes") else "")
        return f"{'; '.join(filter(None, parts))}; {', '.join(constant)}."

    def _radii(self) -> str:
        lengths = any("@L2-" in name for name in self.columns())
        return "@ε is the L∞ radius in 1/255" + (", @L2-ε the L2 length in [0,1] pixels" if lengths else "")

    def _known(self, what: str) -> bool:
        return any(getattr(row, what) is not None for row in self.rows)

    def terminal(self) -> str:
        """Caption, aligned columns and remarks as plain text."""
        return "\n".join([self.caption, "", self._drawn("simple", bold=False), *self._notes()])

    def markdown(self) -> str:
        """Caption, a pipe table with the best figure of every column in bold, and remarks as a list."""
        notes = [f"- {note}" for note in self._notes()]
        return "\n".join([self.caption, "", self._drawn("pipe", bold=True), *([""] if notes else []), *notes, ""])

    def csv(self) -> str:
        """One line per row; every figure has its column, ``… sd`` and ``… published``; then runs, passes and flags."""
        names = self.columns()
        target = io.StringIO()
        writer = csv.writer(target, lineterminator="\n")
        suffixes = ("", " sd", " published")
        last = ["runs", "forward passes", "backward passes", "flags"]
        figures = [name + suffix for name in names for suffix in suffixes]
        writer.writerow(["run", "regularizer", "network", *FACTS.values(), *figures, *last])
        for row in self.rows:
            cells = [row.cells.get(name) for name in names]
            numbers = [n for c in cells for n in ((c.value, c.sd, c.published) if c else (None, None, None))]
            rounded = [None if n is None else round(n, 6) for n in [*numbers, row.runs, *(row.passes or (None, None))]]
            flags = None if row.flags is None else "; ".join(row.flags)
            facts = [row.facts[key] for key in FACTS]
            writer.writerow([row.name or row.run, row.regularizer, row.network, *facts, *rounded, flags])
        return target.getvalue()

    def _notes(self) -> list[str]:
        flags = [f"{row.run}, {row.network}: {flag}" for row in self.rows for flag in row.flags or ()]
        return [*self.remarks, *flags, *map(str, self.incomplete)]

    def columns(self) -> list[str]:
        """Clean, the attacks in the order of their first mention, then ratios and the batch-norm loss."""
        found = dict.fromkeys(name for row in self.rows for name in row.cells)
        last = [*RATIOS, *LOWER_IS_BETTER]
        return [name for name in found if name not in last] + [name for name in last if name in found]

    def varying(self) -> list[str]:
        """Facts that are not the same in every row of students."""
        students = [row for row in self.rows if row.network == "student"]
        return [key for key in FACTS if len({str(row.facts[key]) for row in students}) > 1]

    def _drawn(self, style: str, bold: bool) -> str:
        if not self.rows:
            return ""
        names, varying = self.columns(), self.varying()
        more = [what for what in ("passes", "flags") if self._known(what)]
        body = []
        for row in self.rows:
            texts = [self._text(row, name, bold) for name in names]
            texts += [getattr(row, f"{what}_text") for what in more]
            body.append([row.run, row.regularizer, row.network, *(str(row.facts[key]) for key in varying), *texts])
        headers = ["run", "regularizer", "network", *(FACTS[key] for key in varying), *names, *more]
        left = 3 + len(varying)
        align = ["left"] * left + ["right"] * (len(names) + len(more))
        return str(tabulate(body, headers, tablefmt=style, colalign=align, disable_numparse=True))

    def is_best(self, row: Row, name: str) -> bool:
        """Whether a row has the best figure of a column among several networks of its kind on its data."""

        def kind(each: Row) -> tuple[Any, ...]:
            return each.network, each.facts.get("dataset"), each.facts.get("split")

        peers = [each.cells[name].value for each in self.rows if kind(each) == kind(row) and name in each.cells]
        best = min(peers) if name in LOWER_IS_BETTER else max(peers)
        return len(peers) > 1 and row.cells[name].value == best

    def _text(self, row: Row, name: str, bold: bool) -> str:
        cell = row.cells.get(name)
        return "–" if cell is None else cell.text(bold=bold and self.is_best(row, name))
