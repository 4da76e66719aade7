"""Curvature spectra of runs: a table, the sorted profiles of the paper's Fig. 2, and in how far one lies below another.

``guard spectrum`` makes them (``distill.stages.spectrum``); here they are only read.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from distill.errors import ArtifactError, MissingPackageError
from distill.files import listed, read_json, write_atomic
from distill.robustness.bound import CURVED, Array, Spectrum
from distill.robustness.metrics import mean, sample_deviation
from distill.run_folder import SPECTRUM, SPECTRUM_SUMMARY, changed_inputs, read_manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Arm",
    "Spectrum",
    "arms",
    "draw_profiles",
    "outdated",
    "profile_figure",
    "profile_statement",
    "read_spectra",
    "spectra_table",
    "write_spectra",
]

LOWEST = 1e-4
"""Of the largest eigenvalue; what is smaller, negative ones too, is drawn on a linear scale."""


def read_spectra(run: Path) -> dict[str, Spectrum]:
    """The spectra of a run's ``teacher`` and of its students ``seed0``, …; empty when they were not made to their end.

    Those of networks that have been made anew since, or are being made, are left out.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    folder = run / SPECTRUM
    if "manifest.json" not in listed(folder):
        return {}
    manifest = read_manifest(folder, SPECTRUM)
    old = changed_inputs(run, manifest["recipe"]["inputs"])
    current = [name for name in manifest["networks"] if ("teacher" if name == "teacher" else "student") not in old]
    return {name: Spectrum.read(folder / f"{name}.safetensors") for name in current}


def outdated(run: Path) -> list[str]:
    """Of ``teacher`` and ``student`` those that are others now than the ones a run's spectra were measured on."""
    if "manifest.json" not in listed(run / SPECTRUM):
        return []
    return changed_inputs(run, read_manifest(run / SPECTRUM, SPECTRUM)["recipe"]["inputs"])


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    Attributes:
        name: the last part of the runs' name, or all of it where two of the same seed would share that.
        spectra: (the run's seed, network) → its spectrum.
    """

    name: str
    spectra: dict[tuple[int, str], Spectrum]

    def of(self, students: bool) -> dict[tuple[int, str], Spectrum]:
        """The spectra of the students, or of the teachers."""
        return {key: spectrum for key, spectrum in self.spectra.items() if (key[1] != "teacher") == students}


def arms(runs: Sequence[Path]) -> list[Arm]:
    """Runs with spectra by the last part of their name (``guard`` of ``demo_0/guard``), in the order given."""
    known = [(read_json(run / SPECTRUM / SPECTRUM_SUMMARY), read_spectra(run)) for run in runs]
    places = [(str(summary["name"]).rsplit("/", 1)[-1], int(summary["seed"])) for summary, _ in known]
    found: dict[str, dict[tuple[int, str], Spectrum]] = {}
    for (last, seed), (summary, spectra) in zip(places, known, strict=True):
        name = last if places.count((last, seed)) == 1 else str(summary["name"])
        entries = {(seed, network): spectrum for network, spectrum in spectra.items()}
        if found.setdefault(name, {}).keys() & entries.keys():
            raise ArtifactError(f"Two runs of seed {seed} are called {name}; give only one of them.")
        found[name].update(entries)
    return [Arm(name, entries) for name, entries in found.items()]


def spectra_table(runs: Sequence[Path]) -> str:
    """One row for each network: its curvature, and the terms of Eq. 6 beside the measured loss at one radius."""
    rows, radius = [], None
    for run in runs:
        for name, spectrum in read_spectra(run).items():
            if radius is None:
                radius = float(spectrum.radii[len(spectrum.radii) // 2])
            first, terms = spectrum.eigenvalues[:, 0], spectrum.bound(radius)
            known = np.isclose(spectrum.radii, radius, rtol=1e-9)
            measured = float(spectrum.adversarial_loss[:, known].mean()) if known.any() else None
            cosine = spectrum.mean_cosine
            rows.append(
                [
                    *("/".join(run.resolve().parts[-2:]), name, len(first)),
                    *(f"{value:.4g}" for value in (first.mean(), np.median(first))),
                    f"{100 * float((first > CURVED).mean()):.0f} %",
                    "–" if cosine is None else f"{cosine:.3f}",
                    *(f"{terms[term]:.4g}" for term in ("loss", "gradient", "curvature", "sum")),
                    "–" if measured is None else f"{measured:.4g}",
                ]
            )
    if radius is None:
        return "No spectrum."
    headers = ["run", "network", "images", "mean λ₁", "median λ₁", f"λ₁ > {CURVED:g}", "mean |cos|"]
    headers += ["E[ℓ]", "ρE‖∇ℓ‖", "½ρ²E[λ₁]", "sum", "measured"]
    drawn = tabulate(rows, headers, colalign=["left"] * 2 + ["right"] * 10, disable_numparse=True)
    caption = f"The last five columns are Eq. 6 and the largest loss that was found at ρ = {radius:g}, an L2 length in "
    return f"{drawn}\n{caption}normalised pixels."


def share_below(lower: Spectrum, upper: Spectrum) -> float:
    """At which share of the sorted positions the first profile is less than the second.

    Raises:
        ArtifactError: they are of different numbers of images.
    """
    if len(lower.profile) != len(upper.profile):
        raise ArtifactError(
            f"Profiles of {len(lower.profile)} and {len(upper.profile)} images have no positions in common; give "
            f"guard spectrum the same --images for both."
        )
    return float((lower.profile < upper.profile).mean())


def profile_statement(lower: Arm, upper: Arm, *, students: bool = True) -> str | None:
    """At how many of the sorted positions the profile of one arm lies below the other's, in words.

    Networks of equal seeds are compared, one by one.

    Returns:
        A sentence with mean and sample deviation over the pairs; None when no seeds are common.

    Raises:
        ArtifactError: see ``share_below``.
    """
    first, second = lower.of(students), upper.of(students)
    shares = [100 * share_below(first[key], second[key]) for key in first if key in second]
    if not shares:
        return None
    sd = sample_deviation(shares)
    spread = "" if sd is None else f" ± {sd:.1f}"
    pairs = f"mean ± sample deviation over {len(shares)} pairs of equal seeds" if sd is not None else "one pair"
    return (
        f"{'Students' if students else 'Teachers'}: the profile of {lower.name} lies below {upper.name}'s at "
        f"{mean(shares):.1f}{spread} % of the sorted positions ({pairs})."
    )


def profile_statements(runs: Sequence[Path]) -> list[str]:
    """The statements on two arms, the one with the lower mean λ₁ of its networks first; none for other numbers."""
    both = arms(runs)
    if len(both) != 2:
        return []
    found = []
    for students in (True, False):
        ordered = sorted(both, key=lambda arm: _level(arm.of(students)))
        found.append(profile_statement(*ordered, students=students))
    return [text for text in found if text is not None]


def write_spectra(runs: Sequence[Path], folder: Path | None = None) -> str:
    """The table, the statements on two arms and, for two runs or more, the figure ``spectrum.png``.

    Args:
        runs: with complete spectra.
        folder: where the figure is written; None: beside the first run.

    Returns:
        What is to be printed.
    """
    lines = [spectra_table(runs)]
    if len(runs) > 1:
        picture = (folder or runs[0].resolve().parent) / "spectrum.png"
        draw_profiles(runs, picture)
        lines += ["", *profile_statements(runs), f"Sorted profiles: {picture}"]
    return "\n".join(lines)


def _level(spectra: Mapping[tuple[int, str], Spectrum]) -> float:
    return mean([float(spectrum.profile.mean()) for spectrum in spectra.values()]) if spectra else 0.0


def draw_profiles(runs: Sequence[Path], path: Path) -> None:
    """Write the figure of ``profile_figure`` to a PNG file, atomically. Raises as it does."""
    buffer = io.BytesIO()
    profile_figure(runs).savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def profile_figure(runs: Sequence[Path]) -> Figure:
    """Sorted λ₁ of students and of teachers: a curve for each arm, the mean of its networks in their range (Fig. 2).

    Raises:
        ArtifactError: networks of one arm were measured on different numbers of images.
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"Figures need matplotlib, which could not be imported ({error}); install it with: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    found, largest = arms(runs), 0.0
    for panel, students in zip(panels, (True, False), strict=True):
        for number, arm in enumerate(found):
            profiles = _profiles(arm, students)
            if not len(profiles):
                continue
            position = 100 * (np.arange(profiles.shape[1]) + 0.5) / profiles.shape[1]
            middle = profiles.mean(axis=0)
            counted = f"{len(profiles)} {'student' if students else 'teacher'}{'s' if len(profiles) > 1 else ''}"
            panel.plot(position, middle, color=f"C{number}", label=f"{arm.name} ({counted})")
            if len(profiles) > 1:
                # Deviations would go below zero, which a logarithmic axis shows as far away.
                lowest, highest = profiles.min(axis=0), profiles.max(axis=0)
                panel.fill_between(position, lowest, highest, color=f"C{number}", alpha=0.25, linewidth=0)
            largest = max(largest, float(np.abs(profiles).max()))
        panel.set_title("students" if students else "teachers")
        panel.set_xlabel("images in order of λ₁ [%]")
        panel.grid(alpha=0.3)
        if panel.has_data():
            panel.legend()
    panels[0].set_ylabel("λ₁, largest eigenvalue of the input Hessian")
    panels[0].set_yscale("symlog", linthresh=LOWEST * largest or 1.0)
    return figure


def _profiles(arm: Arm, students: bool) -> Array:
    """(networks, images), each row descending."""
    rows = [spectrum.profile for spectrum in arm.of(students).values()]
    if len({len(row) for row in rows}) > 1:
        raise ArtifactError(
            f"The networks of {arm.name} were measured on {' and '.join(str(len(row)) for row in rows)} images; give "
            f"guard spectrum the same --images for all."
        )
    return np.array(rows)
