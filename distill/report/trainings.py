"""How far the trainings of a run are: epochs, speed and time left, from the last lines of their metrics."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.report.history import metrics_files, parsed
from distill.report.options import read_options
from distill.sharing.status import duration

EPOCHS = {"teacher": "squeeze.epochs", "student": "relabel.epochs"}
"""Artifact → the option that says how many epochs its training has."""
TAIL = 65536
"""Bytes at the end of a file that say how fast a training is."""


def describe_trainings(run: Path) -> dict[str, str]:
    """Artifact → where its training is, for those of which numbers were recorded.

    Raises:
        ArtifactError: ``config.yaml`` is damaged.
    """
    options = read_options(run)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in _latest(run):
        if line.get("stage") in EPOCHS and isinstance(line.get("epoch"), int | float):
            found.setdefault(line["stage"], {}).setdefault(str(line.get("series", "")), []).append(line)
    texts = {}
    for stage, several in found.items():
        total = options.get(EPOCHS[stage])
        if not isinstance(total, int):
            continue
        parts = [
            f"{series + ': ' if series else ''}{_where(lines, total)}" for series, lines in sorted(several.items())
        ]
        texts[stage] = "; ".join(parts)
    return texts


def _latest(run: Path) -> Iterator[dict[str, Any]]:
    for path in metrics_files(run):
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL, 0))
            lines = file.read().decode(errors="replace").splitlines()
        # The first may be the rest of a longer one, which is no JSON.
        yield from (line for line in map(parsed, lines) if line)


def _where(lines: list[dict[str, Any]], total: int) -> str:
    lines = sorted(lines, key=lambda line: line["time"])
    last = lines[-1]
    parts = [f"epoch {last['epoch']:.1f} of {total}"]
    if math.isfinite(last.get("images_per_second", math.nan)):
        parts.append(f"{last['images_per_second']:.4g} images/s")
    since = _since_the_last_start(lines)
    epochs, seconds = last["epoch"] - since["epoch"], last["time"] - since["time"]
    if epochs > 0 and seconds > 0 and last["epoch"] < total:
        parts.append(f"about {duration((total - last['epoch']) * seconds / epochs)} to go")
    if last["epoch"] < total:
        parts.append(f"told {duration(max(time.time() - last['time'], 0.0))} ago")
    return ", ".join(parts)


def _since_the_last_start(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The earliest line after which the training went on without a pause that is long for its steps."""
    gaps = [after["time"] - before["time"] for before, after in itertools.pairwise(lines)]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    first = 0
    for number, (before, after) in enumerate(itertools.pairwise(lines), start=1):
        if after["time"] - before["time"] > 10 * usual or after["step"] <= before["step"]:
            first = number
    return lines[first]
