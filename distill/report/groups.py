"""Runs that differ in nothing but their seed belong together: one row, with a spread over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.report.options import read_options
from distill.report.runs import Run

SEEDS = ("seed", "evaluate.seeds")
SOURCES = ("squeeze.weights", "recover.images", "recover.images_set")
"""Paths of what comes from outside: other files, another run."""
SAME = ("method", "regularizer", "dataset", "ipc", "split")
"""What ``results.json`` says of a run and what repetitions of it share."""


@dataclass(frozen=True)
class Group:
    """One run, or repetitions of one with other seeds.

    Attributes:
        name: of its first run, as ``distinct_names`` tells it from the others.
        runs: at least one, in the order given.
        names: of each of them, as ``distinct_names`` tells them from all that are compared.
    """

    name: str
    runs: list[Run]
    names: Sequence[str]

    @property
    def title(self) -> str:
        """``guard``, or ``guard (3 runs)``."""
        return f"{self.name} ({len(self.runs)} runs)" if len(self.runs) > 1 else self.name

    def name_of(self, run: Run) -> str:
        """What one of its runs is called among all that are compared."""
        return self.names[self.runs.index(run)] if len(self.runs) > 1 else self.name


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put repetitions together: same last part of the name, same configuration but for seeds, places and speed.

    Runs of equal pipeline seeds are no repetitions and stay by themselves.

    Returns:
        Groups in the order of their first run; names are unique unless a run is given twice.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(json.dumps([run.label, _identity(run)], sort_keys=True, default=str), []).append(run)
    parts: list[list[Run]] = []
    for members in alike.values():
        seeds = {run.results.get("seed") for run in members}
        parts += [members] if len(seeds) == len(members) else [[run] for run in members]
    parts.sort(key=lambda members: runs.index(members[0]))
    known = {run.path: name for run, name in zip(runs, distinct_names(runs), strict=True)}
    firsts = distinct_names([members[0] for members in parts])
    return [
        Group(name, members, [known[run.path] for run in members]) for name, members in zip(firsts, parts, strict=True)
    ]


def each_alone(runs: Sequence[Run]) -> list[Group]:
    """Every run as a group of its own, under a name that tells it from the others."""
    return [Group(name, [run], [name]) for name, run in zip(distinct_names(runs), runs, strict=True)]


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The last part of each run's name; where others share it the whole name, and then as much of its path as it takes.

    Returns:
        One name for each run, unique unless a run is given twice.
    """
    names = [run.label for run in runs]
    paths = [run.path.absolute().parts for run in runs]
    ends = [[str(Path(*parts[-count:])) for parts in paths] for count in range(1, max(map(len, paths), default=0) + 1)]
    for longer in ([str(run.results["name"]) for run in runs], *ends):
        names = [name if names.count(name) == 1 else more for name, more in zip(names, longer, strict=True)]
    return names


def _identity(run: Run) -> list[Any]:
    from distill.compose import options

    harmless = {key for key, _, field in options() if not field.metadata["result"]} - {*SOURCES}
    # The regulariser's own options are many levels deep, and the names of attacks are free: what is unknown counts.
    kept = {
        key: value
        for key, value in read_options(run.path).items()
        if key not in harmless and key not in SEEDS and key.split(".")[0] not in {*harmless, "arms", "published"}
    }
    return [{key: run.results.get(key) for key in SAME}, kept]
