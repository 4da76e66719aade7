"""Rows of the comparison from ``results.json``: students first, then teachers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.report.groups import Group, group_runs
from distill.report.runs import IncompleteRun, Run, find_runs
from distill.report.tables import FACTS, RATIOS, Cell, Comparison, Row
from distill.robustness.metrics import attack_label, mean, spread, summarise

Networks = Sequence[Mapping[str, Any]]


def compare_runs(paths: Iterable[str | Path]) -> Comparison:
    """Read runs and put them side by side; repetitions with other seeds make one row.

    Args:
        paths: run folders or experiment folders that hold several runs.

    Returns:
        Students first, then teachers; runs without results are named in ``incomplete``.

    Raises:
        ArtifactError: a folder does not exist or holds no run, or a ``results.json`` cannot be read.
    """
    runs, incomplete = find_runs(paths)
    return compare_groups(group_runs(runs), incomplete)


def compare_groups(groups: Sequence[Group], incomplete: Sequence[IncompleteRun] = ()) -> Comparison:
    """One row for the students of each group, then one for its teachers."""
    rows = [_student_row(group) for group in groups]
    teachers = [_teacher_row(group) for group in groups]
    runs = [run for group in groups for run in group.runs]
    return Comparison([*rows, *(row for row in teachers if row)], _different_attacks(runs), list(incomplete))


def _student_row(group: Group) -> Row:
    networks = [run.results["students"] for run in group.runs]
    first = group.runs[0]
    cells = _cells(networks, (first.results.get("published") or {}).get(first.label, {}))
    losses = [(run.results.get("recover") or {}).get("bn_loss") for run in group.runs]
    if loss := spread(losses):
        cells["BN loss"] = Cell(loss["mean"], loss["sd"], digits=2, few=_few(loss, len(losses)))
    return _row(group, "student", networks, _facts(group), cells)


def _teacher_row(group: Group) -> Row | None:
    """The tested teachers. What they make of distilled images (``teacher_top1``) is no accuracy on real ones."""
    networks = [[run.results["teacher"]] for run in group.runs if run.results.get("teacher")]
    if not networks:
        return None
    return _row(group, "teacher", networks, {**_facts(group), "students": "", "ipc": ""}, _cells(networks, {}))


def _row(group: Group, kind: str, networks: Sequence[Networks], facts: dict[str, Any], cells: dict[str, Cell]) -> Row:
    every = [network for of_run in networks for network in of_run]
    checked = [network["sanity"] for network in every if network.get("sanity")]
    return Row(
        group.title,
        _regularizer(group.runs[0].results["regularizer"]),
        kind,
        facts,
        cells,
        runs=len(networks),
        passes=_passes(every),
        flags=[flag for sanity in checked for flag in sanity.get("flags", ())] if checked else None,
        name=group.name,
    )


def _passes(networks: Networks) -> tuple[float, float] | None:
    """Forward and backward passes of all attacks together for each attacked image, the mean over networks."""
    sums = []
    for network in networks:
        efforts = [attack.get("effort") for attack in network["attacks"]]
        if not efforts or not all(efforts):
            return None
        sums.append(tuple(sum(effort[way] for effort in efforts if effort) for way in ("forward", "backward")))
    return (mean([each[0] for each in sums]), mean([each[1] for each in sums])) if sums else None


def _cells(networks: Sequence[Networks], published: Mapping[str, float]) -> dict[str, Cell]:
    """Figures of one run's networks with the spread over them, or the runs' means with the spread over runs."""
    summaries = [summarise(of_run) for of_run in networks]
    total = len(networks) if len(networks) > 1 else len(networks[0])

    def over(values: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
        return values[0] if len(summaries) == 1 else spread([value["mean"] if value else None for value in values])

    def percent(figure: Mapping[str, Any], stated: float | None) -> Cell:
        sd = None if figure["sd"] is None else 100 * figure["sd"]
        return Cell(100 * figure["mean"], sd, stated, few=_few(figure, total))

    cells = {}
    if top1 := over([summary["top1"] for summary in summaries]):
        cells["clean"] = percent(top1, published.get("clean"))
    for label in dict.fromkeys(label for summary in summaries for label in summary["attacks"]):
        if attacked := over([summary["attacks"].get(label) for summary in summaries]):
            cells[label] = percent(attacked, published.get(label, published.get(label.removesuffix("@1"))))
    for name, key in zip(RATIOS, ("rr", "i_rr"), strict=True):
        if ratio := over([summary[key] for summary in summaries]):
            cells[name] = Cell(ratio["mean"], ratio["sd"], digits=2, few=_few(ratio, total))
    return cells


def _few(figure: Mapping[str, Any], total: int) -> str:
    return f"{figure['n']} of {total}" if figure["n"] < total else ""


def _facts(group: Group) -> dict[str, Any]:
    results, students = group.runs[0].results, group.runs[0].results["students"]
    images = students[0]["clean"]["count"]
    attacked = {attack["count"] for attack in students[0]["attacks"]} - {images}
    counted = f"{images} ({', '.join(map(str, sorted(attacked)))} attacked)" if attacked else str(images)
    numbers = sorted({len(run.results["students"]) for run in group.runs})
    each = " or ".join(map(str, numbers)) + (" per run" if len(group.runs) > 1 else "")
    return {**{key: results.get(key, "") for key in FACTS}, "students": each, "images": counted}


AS_EVER = {"every": 1, "fraction": 1.0, "gradients": "auto", "h_scaling": True}
"""What a regulariser's name does not need to say."""


def _regularizer(options: Mapping[str, Any]) -> str:
    """``curvature λ=1 h=1.5``: the name, λ, and whatever else is set and not as ever."""
    names = {"weight": "λ", **{key: key for key in options if key not in ("name", "weight")}}
    given = [(name, options.get(key)) for key, name in names.items() if options.get(key) != AS_EVER.get(key)]
    given = [(name, value) for name, value in given if value is not None and value != {}]
    texts = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in given]
    return " ".join([str(options["name"]), *texts])


def _different_attacks(runs: Sequence[Run]) -> list[str]:
    """A remark for every attack that was not the same in all runs, its seed aside, or saw another number of images."""
    seen: dict[str, set[str]] = {}
    for run in runs:
        for network in [*run.results["students"], *filter(None, [run.results.get("teacher")])]:
            for attack in network["attacks"]:
                specification = dict(attack["specification"])
                arguments = {k: v for k, v in specification.get("arguments", {}).items() if k != "seed"}
                same = {
                    **specification,
                    "arguments": arguments,
                    "seed": None,
                    "ensemble": None,
                    "count": attack["count"],
                }
                seen.setdefault(attack_label(attack), set()).add(json.dumps(same, sort_keys=True))
    return [
        f"The attack {label} did not have the same settings and number of images in every run."
        for label, specifications in seen.items()
        if len(specifications) > 1
    ]
