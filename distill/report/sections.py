"""The tables of the page: headline, published figures, attacks, sanity checks, costs, configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.report.charts import Spectra
from distill.report.comparison import compare_groups
from distill.report.costs import hours_text, kept_bytes, read_provenance, size_text, stage_costs
from distill.report.groups import Group
from distill.report.options import read_options
from distill.report.tables import FACTS, RATIOS, Comparison
from distill.robustness.metrics import attack_label

PLACES = ("name", "run_root", "data_root", "arm", "arms", "controls", "published")
"""Options in which runs always differ, or which say nothing of how they were made."""


@dataclass(frozen=True)
class Field:
    """A cell: its text, what it is sorted by, whether it is the best of its column, and what stands beside it."""

    text: str
    value: float | str | None = None
    best: bool = False
    beside: str = ""


@dataclass(frozen=True)
class Line:
    """A row. ``group`` is the position of its run among those on the page, None where it belongs to no single one."""

    head: str
    fields: list[Field]
    group: int | None = None


@dataclass(frozen=True)
class Table:
    """A table of the page; its first column names the rows."""

    caption: str
    headings: list[str]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    failed: int = 0
    """So many of its checks were not passed."""

    @property
    def numeric(self) -> list[bool]:
        """For each heading whether some cell below it has a number, by which the column is sorted then."""
        columns = zip(*(line.fields for line in self.lines), strict=True)
        return [False, *(any(isinstance(each.value, int | float) for each in column) for column in columns)]


def headline(comparison: Comparison, groups: Sequence[Group], caption: str = "") -> Table:
    """The comparison as a table that can be sorted; the best figure among students and among teachers is marked."""
    columns, varying = comparison.columns(), comparison.varying()
    more = [what for what in ("passes", "flags") if any(getattr(row, what) is not None for row in comparison.rows)]
    numbers = {group.title: number for number, group in enumerate(groups)}
    lines = []
    for row in comparison.rows:
        fields = [Field(row.regularizer), Field(row.network), *(Field(str(row.facts[key])) for key in varying)]
        for name in columns:
            if cell := row.cells.get(name):
                published = "" if cell.published is None else f"paper {cell.published:g}"
                best = comparison.is_best(row, name)
                fields.append(Field(cell.measured, cell.value, best, published))
            else:
                fields.append(Field("–"))
        if "passes" in more:
            fields.append(Field(row.passes_text, sum(row.passes) if row.passes else None))
        if "flags" in more:
            fields.append(Field(row.flags_text, None if row.flags is None else len(row.flags)))
        lines.append(Line(row.run, fields, numbers.get(row.run)))
    headings = ["run", "regularizer", "network", *(FACTS[key] for key in varying), *columns, *more]
    return Table(caption or comparison.caption, headings, lines, comparison.remarks)


def leader(comparison: Comparison) -> str:
    """What students keep under the attack that leaves them the least; empty for one run, or for several data sets."""
    students = [row for row in comparison.rows if row.network == "student"]
    attacks = [
        name
        for name in comparison.columns()
        if name not in ("clean", "BN loss", *RATIOS) and all(name in row.cells for row in students)
    ]
    if len(students) < 2 or not attacks or {"dataset", "split"} & set(comparison.varying()):
        return ""
    worst = min(attacks, key=lambda name: max(row.cells[name].value for row in students))
    ordered = sorted(students, key=lambda row: -row.cells[worst].value)
    told = ", ".join(f"{row.run} {row.cells[worst].measured} %" for row in ordered[:6])
    clean = ", ".join(f"{row.run} {row.cells['clean'].measured} %" for row in ordered[:6])
    return f"Students under the hardest attack, {worst}: {told}. Without attack: {clean}."


def published(groups: Sequence[Group]) -> Table | None:
    """What the paper prints, whether or not it was measured here; None where no run has published figures."""
    lines = []
    comparison = compare_groups(groups)
    for number, (group, row) in enumerate(zip(groups, comparison.rows, strict=False)):
        first = group.runs[0]
        for name, stated in ((first.results.get("published") or {}).get(first.label) or {}).items():
            cell = row.cells.get(name) or row.cells.get(f"{name}@1")
            ours = Field(cell.measured, cell.value) if cell else Field("–")
            gap = Field(f"{cell.value - stated:+.1f}", cell.value - stated) if cell else Field("–")
            lines.append(Line(group.title, [Field(name), ours, Field(f"{stated:g}", stated), gap], number))
    caption = "Accuracy of students in %, as measured and as the paper prints it"
    return Table(caption, ["run", "measure", "measured", "paper", "difference"], lines) if lines else None


def attacks(groups: Sequence[Group]) -> Table | None:
    """Every attack on every network: images, effort, and its full specification."""
    lines = []
    for number, _, name, network in _networks(groups):
        for attack in network["attacks"]:
            effort = attack.get("effort") or {}
            passes = [
                Field(f"{effort[way]:,.1f}", effort[way]) if way in effort else Field("–")
                for way in ("forward", "backward")
            ]
            accuracy = Field(f"{100 * attack['accuracy']:.2f}", attack["accuracy"])
            count = Field(f"{attack['count']:,}", attack["count"])
            text = json.dumps(attack.get("specification", {}), sort_keys=True, ensure_ascii=False)
            lines.append(Line(name, [Field(attack_label(attack)), accuracy, count, *passes, Field(text)], number))
    headings = ["network", "attack", "accuracy, %", "images", "forward passes", "backward passes", "specification"]
    caption = "Every attack; passes are means for each attacked image"
    return Table(caption, headings, lines) if lines else None


def flags(groups: Sequence[Group]) -> list[tuple[int, str]]:
    """Everything that looks like gradient masking: position of the run, and a sentence that names the network."""
    return [
        (number, f"{name}: {flag}")
        for number, _, name, network in _networks(groups)
        for flag in (network.get("sanity") or {}).get("flags", ())
    ]


def sanity(groups: Sequence[Group]) -> Table | None:
    """Every check of every network; None where none was made."""
    lines, failed = [], 0
    for number, _, name, network in _networks(groups):
        for check in (network.get("sanity") or {}).get("checks", ()):
            epsilon = check.get("epsilon")
            failed += not check["passed"]
            lines.append(
                Line(
                    name,
                    [
                        Field(str(check["name"])),
                        Field("passed" if check["passed"] else "NOT PASSED"),
                        Field("–" if epsilon is None else f"{epsilon:g}", epsilon),
                        *(_percent(check.get(key)) for key in ("value", "reference")),
                        Field(str(check.get("sentence") or "")),
                    ],
                    number,
                )
            )
    headings = ["network", "check", "outcome", "ε", "value, %", "reference, %", "meaning"]
    return Table("Checks against gradient masking", headings, lines, failed=failed) if lines else None


def curvature(groups: Sequence[Group], spectra: Spectra) -> Table | None:
    """Mean and median of λ₁, how far gradients point along its direction, and the bound's terms at the largest ρ."""
    import numpy as np

    lines = []
    for number, (group, found) in enumerate(zip(groups, spectra, strict=True)):
        for run, of_run in zip(group.runs, found, strict=True):
            for name, each in of_run.items():
                largest = each.eigenvalues[:, 0]
                values = [float(np.nanmean(largest)), float(np.nanmedian(largest)), each.mean_cosine]
                values += [None] * 4
                if len(each.radii):
                    terms = each.bound(float(each.radii[-1]))
                    values[3:] = [terms[key] for key in ("loss", "gradient", "curvature")]
                    values.append(float(np.nanmean(each.adversarial_loss[:, -1])))
                told = [Field("–") if value is None else Field(f"{value:.4g}", value) for value in values]
                radius = Field(f"{each.radii[-1]:g}", float(each.radii[-1])) if len(each.radii) else Field("–")
                lines.append(
                    Line(
                        f"{group.name_of(run)}, {name}", [Field(f"{len(largest)}", len(largest)), *told, radius], number
                    )
                )
    headings = ["network", "images", "mean λ₁", "median λ₁", "mean |cos|"]
    headings += ["E[ℓ]", "ρE‖∇ℓ‖", "½ρ²E[λ₁]", "measured loss", "ρ"]
    return Table("Curvature of the loss in the image", headings, lines) if lines else None


def costs(groups: Sequence[Group]) -> Table | None:
    """Hours of processors for each stage and bytes of what is kept, one row for each run."""
    rows = []
    stages: dict[str, None] = {}
    sizes: dict[str, None] = {}
    for number, group in enumerate(groups):
        for run in group.runs:
            spent, kept = stage_costs(read_provenance(run.path)), kept_bytes(run.path)
            rows.append((number, group.name_of(run), {cost.stage: cost for cost in spent}, kept))
            stages |= {cost.stage: None for cost in spent}
            sizes |= dict.fromkeys(kept)
    if not stages and not sizes:
        return None
    lines, notes = [], set()
    for number, name, by_stage, kept in rows:
        fields = []
        sums: dict[str, float] = {}
        for stage in stages:
            cost = by_stage.get(stage)
            hours = cost.hours if cost else {}
            for kind, value in hours.items():
                sums[kind] = sums.get(kind, 0.0) + value
            mark = " +" if cost and cost.unfinished else ""
            notes |= {"+: with pieces of work that were interrupted and left no time."} if mark else set()
            fields.append(Field(_hours(hours) + mark, sum(hours.values()) if hours else None))
        fields.append(Field(_hours(sums), sum(sums.values()) if sums else None))
        fields += [Field(size_text(kept[key]), kept[key]) if key in kept else Field("–") for key in sizes]
        devices = dict.fromkeys(cost.device for cost in by_stage.values())
        lines.append(Line(name, [*fields, Field("; ".join(devices))], number))
    caption = "Hours of CPU threads and GPUs, summed over processes, and bytes on disk"
    return Table(caption, ["run", *stages, "all", *sizes, "hardware"], lines, sorted(notes))


def differences(groups: Sequence[Group]) -> Table | None:
    """Options that are not the same in every run, one column for each run; None when there are none."""
    runs = [(group.name_of(run), read_options(run.path)) for group in groups for run in group.runs]
    runs = [(name, options) for name, options in runs if options]
    keys = dict.fromkeys(key for _, options in runs for key in options if key.split(".")[0] not in PLACES)
    lines = []
    for key in keys:
        texts = [_value(options[key]) if key in options else "–" for _, options in runs]
        if len(set(texts)) > 1:
            lines.append(Line(key, [Field(text) for text in texts]))
    heads = ["option", *(name for name, _ in runs)]
    return Table("Options that differ between the runs", heads, lines) if lines else None


def run_files(groups: Sequence[Group]) -> list[tuple[int, str, list[tuple[str, str]]]]:
    """For each run its name and what can be unfolded: the configuration and the provenance, as text."""
    found = []
    for number, group in enumerate(groups):
        for run in group.runs:
            texts = []
            for title, name in (("Configuration", "config.yaml"), ("Provenance", "provenance.json")):
                path = run.path / name
                if path.is_file():
                    texts.append((f"{title} ({name})", path.read_text(encoding="utf-8", errors="replace")))
            found.append((number, group.name_of(run), texts))
    return found


def _networks(groups: Sequence[Group]) -> Iterator[tuple[int, Group, str, Mapping[str, Any]]]:
    """Every tested network with the position of its group and its name."""
    for number, group in enumerate(groups):
        for run in group.runs:
            named = [("teacher", run.results.get("teacher"))]
            named += [(f"student, seed {student.get('seed')}", student) for student in run.results["students"]]
            for name, network in named:
                if network:
                    yield number, group, f"{group.name_of(run)}, {name}", network


def _percent(value: float | None) -> Field:
    return Field("–") if value is None else Field(f"{100 * value:.1f}", value)


def _hours(hours: Mapping[str, float]) -> str:
    return " + ".join(f"{hours_text(value)} {kind}" for kind, value in hours.items()) or "–"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
