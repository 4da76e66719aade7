"""``report.html``: one file with everything, read in any browser, without a network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import __version__
from distill.files import digest, file_digest, write_atomic
from distill.report import sections
from distill.report.charts import accuracy_plots, outdated_spectra, read_all_spectra, spectrum_plots, training_plots
from distill.report.comparison import compare_groups
from distill.report.groups import Group, each_alone, group_runs
from distill.report.history import metrics_files
from distill.report.plots import DARK_PALETTE, DASHED, MARKERS, PALETTE, Plot, marker, svg
from distill.report.runs import IncompleteRun, Run, find_runs
from distill.report.thumbnails import BUDGET, distilled_sheet, film_sheet

PAGE = "report.html"
HERE = Path(__file__).parent
SOURCES: tuple[str, ...] = (
    "results.json",
    "config.yaml",
    "provenance.json",
    "distilled/manifest.json",
)
SOURCES += ("teacher/manifest.json", "labels/manifest.json", "student/manifest.json", "spectrum/manifest.json")
"""Files of a run from which the page is made; distilled images and spectra are known by their manifests."""
PROGRAMS: tuple[str, ...] = ("robustness/bound.py", "robustness/metrics.py", "run_folder.py")
PROGRAMS += ("compose.py", "config.py", "config_cluster.py", "config_machine.py")
"""Of ``distill``, beside those of the report: figures and what is out of date; which options repetitions share."""
TEXT_LIMIT = 3_000_000
"""Characters of configurations and provenance; those of further runs are left out."""


def write_page(path: Path, folders: Sequence[str | Path]) -> bool:
    """Write the page of some runs, atomically; one that was made of the same files is left alone.

    Args:
        path: the HTML file.
        folders: run folders, or folders with runs below them.

    Returns:
        Whether there is a page: not where no run is finished.

    Raises:
        ArtifactError: a folder does not exist or holds no run, or a file of a run is damaged.
    """
    runs, incomplete = find_runs(folders)
    if not runs:
        return False
    inputs = inputs_digest(runs, incomplete)
    if made_of(path) != inputs:
        write_atomic(path, render(runs, incomplete, inputs))
    return True


def inputs_digest(runs: Sequence[Run], incomplete: Sequence[IncompleteRun] = ()) -> str:
    """Changes with every file that the page is made from, the programs included."""
    files = [[name, _digest(run.path / name)] for run in runs for name in SOURCES]
    files += [[path.name, _digest(path)] for run in runs for path in metrics_files(run.path)]
    programs = [*sorted(file for file in HERE.iterdir() if file.is_file()), *(HERE.parent / name for name in PROGRAMS)]
    own = [[file.name, file_digest(file)] for file in programs]
    return digest([files, own, __version__, list(map(str, incomplete))])


def made_of(path: Path) -> str | None:
    """The digest that a page says it was made of; None when there is no such page."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.search(r'<meta name="guard-inputs" content="(\w+)">', file.read(10_000))
    return found[1] if found else None


def render(
    runs: Sequence[Run], incomplete: Sequence[IncompleteRun] = (), inputs: str = "", budget: int = BUDGET
) -> str:
    """The page as text; equal files make equal bytes.

    Args:
        runs: at least one finished run.
        incomplete: runs to be named as not finished.
        inputs: what the page is to say it was made of.
        budget: bytes that the pictures of each table may take.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    groups = group_runs(runs)
    alone = each_alone(runs) if len(groups) < len(runs) else []
    comparison, spectra = compare_groups(groups), read_all_spectra(groups)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    parts: dict[str, Any] = {
        "groups": groups,
        "leader": sections.leader(comparison),
        "flags": sections.flags(groups),
        "headline": sections.headline(comparison, groups),
        "alone": _alone(alone, groups),
        "incomplete": incomplete,
        "published": sections.published(groups),
        "accuracy": _drawn(accuracy_plots(groups)),
        "distilled": distilled_sheet(groups, budget),
        "film": film_sheet(groups, budget),
        "curvature": sections.curvature(groups, spectra),
        "outdated_spectra": outdated_spectra(groups),
        "spectra": _drawn(spectrum_plots(groups, spectra)),
        "sanity": sections.sanity(groups),
        "training": _drawn(training_plots(groups)),
        "attacks": sections.attacks(groups),
        "costs": sections.costs(groups),
        "differences": sections.differences(groups),
        "runs": _limited(sections.run_files(groups)),
    }
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    palettes = {"palette": PALETTE, "dark_palette": DARK_PALETTE, "dashed": DASHED}
    return environment.get_template("page.html.jinja").render(
        **parts,
        **palettes,
        markers=MARKERS,
        marker=marker,
        title=_title(runs),
        contents=_contents(parts),
        style=environment.get_template("page.css").render(palettes),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        inputs=inputs,
    )


def _title(runs: Sequence[Run]) -> str:
    """The names of the experiments, or of the runs that are none of an experiment."""
    names = dict.fromkeys(str(run.results["name"]).rsplit("/", 1)[0] for run in runs)
    return ", ".join(list(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _alone(alone: Sequence[Group], groups: Sequence[Group]) -> sections.Table | None:
    if not alone:
        return None
    table = sections.headline(compare_groups(alone), [])
    of_run = {id(run): number for number, group in enumerate(groups) for run in group.runs}
    owners = {each.title: of_run[id(each.runs[0])] for each in alone}
    lines = [sections.Line(line.head, line.fields, owners[line.head]) for line in table.lines]
    return sections.Table(table.caption, table.headings, lines)


def _drawn(plots: Sequence[Plot]) -> list[tuple[Plot, str]]:
    return [(plot, svg(plot)) for plot in plots]


def _contents(parts: dict[str, Any]) -> list[tuple[str, str]]:
    """The sections that are on the page, with the names of their links."""
    names = {"results": "Results", "published": "Beside the paper", "accuracy": "Accuracy over the radius"}
    names |= {"images": "Images", "curvature": "Curvature", "sanity": "Sanity", "training": "Training"}
    names |= {"attacks": "Attacks", "costs": "Costs", "origin": "Configuration and provenance"}
    there = {**parts, "results": True, "images": parts["distilled"] or parts["film"], "origin": True}
    there["curvature"] = parts["curvature"] or parts["outdated_spectra"]
    return [(key, name) for key, name in names.items() if there[key]]


def _limited(runs: Sequence[tuple[int, str, list[tuple[str, str]]]]) -> list[tuple[int, str, list[tuple[str, str]]]]:
    """Texts of so many runs as fit; of the others it is said where they are."""
    left, kept = TEXT_LIMIT, []
    for number, name, files in runs:
        left -= sum(len(text) for _, text in files)
        if left < 0:
            files = [
                ("left out", "So that the page stays small; config.yaml and provenance.json are in the run's folder.")
            ]
        kept.append((number, name, files))
    return kept


def _digest(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None
