"""Find finished runs on disk, and say what the others lack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import ArtifactError
from distill.files import read_json
from distill.report.options import read_options
from distill.run_folder import RESULTS, STAGES, of_other_outcomes

NEEDED_FOLDERS = STAGES[:-1]
"""Each is complete when its manifest is there; ``results.json`` stands for the outcomes."""
OLD = f"{RESULTS} of its present outcomes/, only one of earlier ones"
"""What a run lacks that is evaluated anew."""
NEEDED = ("name", "regularizer", "dataset", "ipc", "split", "students")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its ``results.json``."""

    path: Path
    results: dict[str, Any]

    @property
    def label(self) -> str:
        """The last part of the run's name: ``guard`` of ``demo/guard``."""
        return str(self.results["name"]).rsplit("/", 1)[-1]


@dataclass(frozen=True)
class IncompleteRun:
    """A run without ``results.json``, or with one of earlier outcomes than those that are made now."""

    path: Path
    missing: list[str]

    def __str__(self) -> str:
        return f"{self.path} is not finished: it has no {', '.join(self.missing)}."


def find_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[IncompleteRun]]:
    """Runs under the given folders, in the order given.

    Args:
        paths: run folders, or folders of experiments whose sub-folders are runs (taken by name).

    Raises:
        ArtifactError: a folder does not exist or holds no run, or a ``results.json`` cannot be read.
    """
    finished, incomplete = [], []
    for folder in run_folders(paths):
        if not (folder / RESULTS).is_file():
            incomplete.append(IncompleteRun(folder, _missing(folder)))
            continue
        results = _read(folder / RESULTS)
        if of_other_outcomes(folder, results.get("fingerprint")):
            incomplete.append(IncompleteRun(folder, [OLD]))
        else:
            finished.append(Run(folder, results))
    return finished, incomplete


def run_folders(paths: Iterable[str | Path], *, none: bool = False) -> list[Path]:
    """The run folders among or below the given folders, finished or not.

    Args:
        none: a folder may hold no run.

    Raises:
        ArtifactError: a folder does not exist or holds no run.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ArtifactError(f"The run folder {path} does not exist.")
        folders = list(_below(path))
        if not folders and not none:
            raise ArtifactError(
                f"{path} holds no run: neither it nor any folder below it has a results.json or config.yaml."
            )
        found += folders
    return found


def _below(folder: Path) -> Iterator[Path]:
    """The runs at and below a folder, sorted; a run holds no other, and links are followed to runs alone."""
    if _is_run(folder):
        yield folder
        return
    for each in sorted(folder.iterdir()):
        if each.is_dir() and not each.name.startswith(".") and (not each.is_symlink() or _is_run(each)):
            yield from _below(each)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RESULTS, "config.yaml"))


def _missing(folder: Path) -> list[str]:
    """The first folder that is not complete, and the results that wait for it."""
    options = read_options(folder)
    unstored = options.get("relabel.mode") == "online" or options.get("evaluate.labels") == "hard"
    stages = [stage for stage in NEEDED_FOLDERS if not (unstored and stage == "labels")]
    first = next((stage for stage in stages if not (folder / stage / "manifest.json").is_file()), None)
    return [f"complete {first}/", RESULTS] if first else [RESULTS]


def _read(path: Path) -> dict[str, Any]:
    results = read_json(path)
    if not isinstance(results, dict) or any(key not in results for key in NEEDED) or not results["students"]:
        raise ArtifactError(f"{path} is not the results of a run of this version; run guard evaluate on it again.")
    return results
