"""What the page draws: accuracy over the radius, training curves, curvature and the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill.report.groups import Group
from distill.report.history import read_history
from distill.report.plots import Line, Plot
from distill.robustness.metrics import mean, sample_deviation
from distill.run_folder import SPECTRUM

if TYPE_CHECKING:
    from distill.report.spectra import Spectrum

DRAWN = 24
"""So many runs (repetitions counted once) are drawn at most."""
PROFILE_POINTS = 200
REPETITIONS = 5
"""So many repetitions of one run are drawn in training curves."""
TRAINING = {
    ("teacher", "loss"): ("Squeeze: loss of the teacher", "step", "loss"),
    ("teacher", "accuracy"): ("Squeeze: accuracy on training batches", "step", "accuracy, %"),
    ("teacher", "penalty"): ("Squeeze: penalty, with its weight", "step", "penalty"),
    ("distilled", "loss"): ("Recovery: loss, mean over units", "iteration", "loss"),
    ("distilled", "cross_entropy"): ("Recovery: cross-entropy", "iteration", "cross-entropy"),
    ("distilled", "batchnorm_matching"): ("Recovery: batch-norm matching", "iteration", "BN loss"),
    ("student", "loss"): ("Students: loss against the soft labels", "step", "loss"),
    ("student", "accuracy"): ("Students: agreement with the labels of their batches", "step", "accuracy, %"),
}
RADIUS = {"Linf": "L∞ radius in 1/255", "L2": "L2 radius, pixels in [0,1]"}


def accuracy_plots(groups: Sequence[Group]) -> list[Plot]:
    """Accuracy over the radius, for each attack that was run at two or more radii."""
    kinds: dict[tuple[str, str], None] = {}
    for _, network in _networks(groups, everyone=True):
        kinds |= {_kind(attack): None for attack in network["attacks"] if attack["epsilon"] is not None}
    plots = []
    for place, (name, norm) in enumerate(kinds):
        lines = [
            line
            for number, group in enumerate(groups[:DRAWN])
            for kind in ("student", "teacher")
            if (line := _accuracy_line(group, number, kind, (name, norm)))
        ]
        if not any(len(line.x) > 2 for line in lines):
            continue
        told = "; ".join(
            f"{line.name}, {line.kind}: " + ", ".join(f"{y:.1f} at {x:g}" for x, y in zip(line.x, line.y, strict=True))
            for line in lines
        )
        plots.append(
            Plot(
                _key("accuracy", str(place), name, norm),
                f"{name}: accuracy over the {'radius' if norm == 'Linf' else 'L2 radius'}",
                RADIUS.get(norm, f"{norm} radius"),
                "accuracy, %",
                f"Accuracy in per cent under {name} by {RADIUS.get(norm, norm)}, 0 being no attack. {told}.",
                lines,
                log=False,
                y_range=(0, 102),
                note=_left_out(groups),
            )
        )
    return plots


def _accuracy_line(group: Group, number: int, kind: str, attack: tuple[str, str]) -> Line | None:
    """Means over the runs of a group, each being the mean over its networks."""
    of_runs: list[dict[float, float]] = []
    for run in group.runs:
        networks = _of_kind(run.results, kind)
        own = [a for network in networks for a in network["attacks"] if a["epsilon"] is not None and _kind(a) == attack]
        if not own:
            continue
        of_runs.append(_points(own))
        shares = [[a for a in network["attacks"] if a in own] for network in networks]
        singles = [_points(share) for share in shares if share]
    if not of_runs:
        return None
    radii = sorted(set.intersection(*(set(points) for points in of_runs)))
    values = {radius: [points[radius] for points in of_runs] for radius in radii}
    if len(of_runs) == 1:
        # The spread over a single run's students.
        values = {radius: [each[radius] for each in singles if radius in each] for radius in radii}
    y = [100 * mean(values[radius]) for radius in radii]
    sd = [100 * (sample_deviation(values[radius]) or 0.0) for radius in radii]
    return Line(radii, y, number, group.title, kind, sd)


def _points(attacks: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Radius → mean accuracy under an attack; at 0 it is clean, of the attacked images, which may be fewer than the
    tested ones."""
    points = {0.0: mean([attack["clean"] for attack in attacks])}
    for epsilon in sorted({float(attack["epsilon"]) for attack in attacks}):
        points[epsilon] = mean([attack["accuracy"] for attack in attacks if attack["epsilon"] == epsilon])
    return points


def training_plots(groups: Sequence[Group]) -> list[Plot]:
    """Curves of squeeze, recovery and students from ``metrics.jsonl``; one line for each run."""
    drawn = groups[:DRAWN]
    histories = [[read_history(run.path) for run in group.runs[:REPETITIONS]] for group in drawn]
    plots = []
    for key, (title, x_label, y_label) in TRAINING.items():
        scale = 100 if y_label.endswith("%") else 1
        lines = [
            Line(curve[0], [scale * y for y in curve[1]], number, group.title, "", thin=len(group.runs) > 1)
            for number, (group, several) in enumerate(zip(drawn, histories, strict=True))
            for history in several
            if (curve := history.get(key)) and any(curve[1])
        ]
        if lines:
            told = "; ".join(f"{line.name}: from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines)
            note = _left_out(groups)
            if any(len(group.runs) > REPETITIONS for group in drawn):
                note = f"{note} The first {REPETITIONS} repetitions of each run are drawn.".strip()
            alt = f"{title}, over {lines[0].x[-1]:g} {x_label}s. {told}."
            plots.append(Plot(_key(*key), title, x_label, y_label, alt, lines, note=note))
    return plots


Spectra = Sequence[Sequence[Mapping[str, "Spectrum"]]]
"""For each group and each of its runs: name of a network → what was measured on it; empty where nothing was."""


def read_all_spectra(groups: Sequence[Group]) -> Spectra:
    """The spectra of every run."""
    if not _measured(groups):
        return [[{} for _ in group.runs] for group in groups]
    from distill.report.spectra import read_spectra

    return [[read_spectra(run.path) for run in group.runs] for group in groups]


def outdated_spectra(groups: Sequence[Group]) -> list[str]:
    """A sentence for every run with spectra that are not shown, because their networks were made anew."""
    if not _measured(groups):
        return []
    from distill.report.spectra import outdated

    return [
        f"The spectra of {' and '.join(old)} in {run.path / SPECTRUM} are of earlier networks and not shown; "
        f"remove that folder and run guard spectrum again."
        for group in groups
        for run in group.runs
        if (old := outdated(run.path))
    ]


def _measured(groups: Sequence[Group]) -> bool:
    """Whether some run has spectra; without any, what reads them need not be loaded."""
    return any((run.path / SPECTRUM).is_dir() for group in groups for run in group.runs)


def spectrum_plots(groups: Sequence[Group], spectra: Spectra) -> list[Plot]:
    """The sorted eigenvalue profile of every run, and for each the terms of the bound beside the measured loss."""
    lines = [
        _profile_line(runs, number, group.title, kind)
        for number, (group, found) in enumerate(zip(groups[:DRAWN], spectra, strict=False))
        for kind in ("student", "teacher")
        if (runs := _of_spectra(found, kind))
    ]
    if not lines:
        return []
    told = "; ".join(f"{line.name}, {line.kind}: from {line.y[0]:.3g} down to {line.y[-1]:.3g}" for line in lines)
    profile = Plot(
        "eigenvalues",
        "Largest eigenvalue of the loss's Hessian in the image, sorted",
        "share of images, %",
        "λ₁",
        f"Sorted profile of the largest eigenvalue λ₁ over the images. {told}.",
        lines,
        note=_left_out(groups),
    )
    return [profile, *_bound_plots(groups, spectra)]


def _bound_plots(groups: Sequence[Group], spectra: Spectra) -> Iterator[Plot]:
    for kind, title in (("student", "Students"), ("teacher", "Teachers")):
        lines = _bound_lines(groups, spectra, kind, "bound", _bound)
        lines += _bound_lines(groups, spectra, kind, "measured", lambda each: each.adversarial_loss.mean(0))
        if lines:
            told = "; ".join(f"{line.name}, {line.kind}: {line.y[-1]:.3g} at ρ = {line.x[-1]:g}" for line in lines)
            title = f"{title}: the bound and the measured loss at distance ρ"
            alt = f"The bound E[ℓ] + ρE‖∇ℓ‖ + ½ρ²E[λ₁] and the measured loss. {told}."
            yield Plot(f"bound-{kind}", title, "ρ (L2, normalised pixels)", "loss", alt, lines)


def _bound_lines(
    groups: Sequence[Group], spectra: Spectra, network: str, kind: str, of: Callable[[Any], NDArray[Any]]
) -> list[Line]:
    lines = []
    for number, (group, found) in enumerate(zip(groups[:DRAWN], spectra, strict=False)):
        runs = [of_run for of_run in _of_spectra(found, network) if len(of_run[0].radii)]
        # Measured at other radii, a run cannot be averaged with the first.
        runs = [of_run for of_run in runs if np.array_equal(of_run[0].radii, runs[0][0].radii)]
        if runs:
            middle, spread = _over_runs(runs, of)
            lines.append(Line(runs[0][0].radii.tolist(), middle, number, group.title, kind, spread))
    return lines


def _bound(spectrum: Spectrum) -> NDArray[Any]:
    return np.array([spectrum.bound(float(radius))["sum"] for radius in spectrum.radii])


def _profile_line(runs: Sequence[Sequence[Spectrum]], number: int, name: str, kind: str) -> Line:
    most = max(len(each.eigenvalues) for of_run in runs for each in of_run)
    places = np.linspace(0, 1, min(PROFILE_POINTS, max(most, 2)))
    middle, spread = _over_runs(runs, lambda each: _profile(each, places))
    return Line((100 * places).tolist(), middle, number, name, kind, spread)


def _profile(spectrum: Spectrum, places: NDArray[Any]) -> NDArray[Any]:
    """The largest eigenvalues from the greatest down, at these shares of the images."""
    values = spectrum.profile[np.isfinite(spectrum.profile)]
    return np.interp(places, np.linspace(0, 1, len(values)), values)


def _over_runs(
    runs: Sequence[Sequence[Spectrum]], of: Callable[[Any], NDArray[Any]]
) -> tuple[list[float], Sequence[float]]:
    """Mean and sample deviation over runs, each being the mean over its networks; of a single run over its networks."""
    of_runs = [[of(each) for each in of_run] for of_run in runs]
    curves = np.stack(of_runs[0] if len(of_runs) == 1 else [np.mean(each, axis=0) for each in of_runs])
    return curves.mean(0).tolist(), curves.std(0, ddof=1).tolist() if len(curves) > 1 else ()


def _of_spectra(found: Sequence[Mapping[str, Spectrum]], kind: str) -> list[list[Spectrum]]:
    """The networks of one kind of every run that has some."""
    runs = [[each for name, each in run.items() if (name == "teacher") == (kind == "teacher")] for run in found]
    return [of_run for of_run in runs if of_run]


def _networks(groups: Sequence[Group], everyone: bool = False) -> Iterator[tuple[Group, Mapping[str, Any]]]:
    for group in groups:
        for run in group.runs:
            for kind in ("student", "teacher") if everyone else ("student",):
                for network in _of_kind(run.results, kind):
                    yield group, network


def _of_kind(results: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return list(results["students"]) if kind == "student" else list(filter(None, [results.get("teacher")]))


def _kind(attack: Mapping[str, Any]) -> tuple[str, str]:
    return str(attack["name"]), str(attack.get("norm") or "Linf")


def _key(*words: str) -> str:
    return "-".join("".join(c if c.isascii() and c.isalnum() else "-" for c in word) for word in words)


def _left_out(groups: Sequence[Group]) -> str:
    return f"The first {DRAWN} of {len(groups)} runs are drawn." if len(groups) > DRAWN else ""
