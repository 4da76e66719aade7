"""Views of finished runs: tables of accuracies, grids of distilled images, the page, TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["compare", "show_report", "write", "write_page"]


def compare(paths: Sequence[str | Path], form: str = "terminal") -> str:
    """Runs side by side in one table; repetitions with other seeds make one row.

    Args:
        paths: run folders, or experiment folders that hold several runs.
        form: ``terminal``, ``markdown`` or ``csv``.

    Raises:
        ArtifactError: a folder does not exist or holds no run, or a ``results.json`` cannot be read.
    """
    from distill.report.comparison import compare_runs

    table = compare_runs(paths)
    return {"terminal": table.terminal, "markdown": table.markdown, "csv": table.csv}[form]()


def write_page(path: Path, folders: Sequence[str | Path]) -> bool:
    """Write ``report.html`` of some runs, atomically and only when something has changed.

    Args:
        path: the HTML file; it needs no other file and no network.
        folders: run folders, or experiment folders that hold several runs.

    Returns:
        Whether there is a page: not where no run is finished.

    Raises:
        ArtifactError: a folder does not exist or holds no run, or a file of a run is damaged.
    """
    from distill.report.page import write_page

    return write_page(path, folders)


def show_report(folder: Path, runs: Sequence[Path]) -> bool:
    """Show the report in TensorBoard: the table as text, the curves as images, under ``folder/tensorboard/report``.

    Args:
        folder: of the experiment; the run's own where there is but one.
        runs: run folders.

    Returns:
        Whether events were written: not where all is as it was, no run is finished, or no run uses TensorBoard.
    """
    from distill.report.events import show_report

    return show_report(folder, runs)


def write(folder: Path, runs: Sequence[Path]) -> None:
    """Write what is missing or old of an experiment's report, each file atomically.

    ``report.md``, ``report.csv`` and ``report.html`` in the experiment's folder, and the same for TensorBoard;
    ``distilled.png`` in every run that has a complete distilled set, and in the experiment's folder one with the runs
    above each other.

    Args:
        folder: of the experiment; the run's own where there is but one.
        runs: run folders.
    """
    from distill.report.runs import find_runs
    from distill.run_folder import RESULTS

    _write_pictures(folder, runs)
    if all((run / RESULTS).is_file() for run in runs) and not find_runs(runs)[1]:
        _write_tables(folder, runs)
        write_page(folder / "report.html", runs)
        show_report(folder, runs)


def _write_tables(folder: Path, runs: Sequence[Path]) -> None:
    from distill.files import write_atomic
    from distill.report.comparison import compare_runs

    table = compare_runs(runs)
    for path, text in ((folder / "report.md", table.markdown()), (folder / "report.csv", table.csv())):
        if not path.is_file() or path.read_bytes() != text.encode():
            write_atomic(path, text)


def _write_pictures(folder: Path, runs: Sequence[Path]) -> None:
    finished = [run for run in runs if (run / "distilled" / "manifest.json").is_file()]
    newest = max((run / "distilled" / "manifest.json" for run in finished), key=_age, default=None)
    drawn = [run / "distilled.png" for run in finished] + [folder / "distilled.png"] * (len(finished) > 1)
    if newest is None or all(picture.is_file() and _age(picture) >= _age(newest) for picture in drawn):
        return
    import torch

    from distill.data import DistilledSet
    from distill.report.figures import compare_grids, distilled_grid

    pictures, names = {}, []
    for run in finished:
        distilled = DistilledSet.open(run)
        distilled_grid(distilled.images, distilled.labels, distilled.class_names, run / "distilled.png")
        # A whole set may take gigabytes: keep what is shown.
        first = torch.cat([(distilled.labels == label).nonzero()[:2, 0] for label in distilled.labels.unique()])
        pictures[run.name] = distilled.images[first], distilled.labels[first]
        names.append(distilled.class_names)
    if len(pictures) > 1 and all(each == names[0] for each in names):
        compare_grids(pictures, names[0], folder / "distilled.png", per_class=2)


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns
