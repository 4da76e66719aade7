"""What ``metrics.jsonl`` and the files of ``metrics/`` tell of a run, thinned to what a drawing can show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distill.run_folder import METRICS, METRICS_OF_WORKERS

POINTS = 160
"""At most so many points of a curve are kept: means over equal parts of the steps."""

Curve = tuple[list[float], list[float]]
"""Steps and values."""


def read_history(run: Path) -> dict[tuple[str, str], Curve]:
    """The curves of a run: its trainings and its recovery.

    Args:
        run: run folder.

    Returns:
        (stage, name of the quantity) → steps and values. Units of recovery and students of several seeds are averaged
        at each step; a step that was repeated after an interruption counts as it was last. Tests are left out.
        Empty when nothing was written.
    """
    found: dict[tuple[str, str], dict[tuple[str, float], float]] = {}
    for line in read_lines(run):
        stage, series, step = line.get("stage"), line.get("series", ""), line.get("step")
        if stage not in ("teacher", "distilled", "student") or series == "test" or not _number(step):
            continue
        step = float(step or 0)
        for name, value in line.items():
            if name not in ("stage", "series", "step", "time") and _number(value):
                found.setdefault((stage, name), {})[str(series), step] = float(value)
    return {key: _thinned(_mean_over_series(values)) for key, values in found.items()}


def metrics_files(run: Path) -> list[Path]:
    """The files that hold numbers of a run: ``metrics.jsonl``, and one for each worker and series."""
    return [path for path in (run / METRICS, *sorted((run / METRICS_OF_WORKERS).glob("*.jsonl"))) if path.is_file()]


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Every line of a run, in the order of time: with stage, series and step the same, a later one counts."""
    lines = []
    for path in metrics_files(run):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines += [line for text in file if (line := parsed(text))]
    return sorted(lines, key=lambda line: line["time"] if _number(line.get("time")) else 0.0)


def parsed(text: str) -> dict[str, Any]:
    """One line; an empty one where a kill has left half a line."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return line if isinstance(line, dict) else {}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean_over_series(values: dict[tuple[str, float], float]) -> list[tuple[float, float]]:
    by_step: dict[float, list[float]] = {}
    for (_, step), value in values.items():
        by_step.setdefault(step, []).append(value)
    return [(step, math.fsum(several) / len(several)) for step, several in sorted(by_step.items())]


def _thinned(points: list[tuple[float, float]]) -> Curve:
    if len(points) > POINTS:
        size = len(points) / POINTS
        parts = [points[round(number * size) : round((number + 1) * size)] for number in range(POINTS)]
        points = [(part[len(part) // 2][0], math.fsum(value for _, value in part) / len(part)) for part in parts]
    return [step for step, _ in points], [value for _, value in points]
