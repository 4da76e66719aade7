"""Distilled images as they stand on the page: few, small, and inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.errors import ArtifactError
from distill.files import read_json
from distill.report.groups import Group
from distill.report.options import read_options

SMALL = 64
"""Images up to this side in pixels stay as they are, as PNG; larger ones become JPEG of at most ``LARGEST``."""
LARGEST = 112
QUALITY = 85
CLASSES = 10
PER_CLASS = 2
FILM_IMAGES = 3
BUDGET = 3_000_000
"""Bytes that the pictures of one table may take in the page."""


@dataclass(frozen=True)
class Picture:
    """An image as a ``data:`` address, its size in pixels, and what it shows."""

    source: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Strip:
    """A row of pictures.

    Attributes:
        group: position of the run among those on the page.
        name: heading of the row.
        pictures: one for each column; None leaves a place empty.
    """

    group: int
    name: str
    pictures: list[Picture | None]


@dataclass(frozen=True)
class Sheet:
    """Rows of pictures under common headings, and what was left out."""

    headings: list[str]
    strips: list[Strip]
    note: str


def distilled_sheet(groups: Sequence[Group], budget: int = BUDGET) -> Sheet | None:
    """Distilled images of the runs above each other, one column per class; None where no run has a complete set.

    Args:
        groups: the first run of each is shown; those of other classes than the first group's are left out.
        budget: bytes that the pictures may take; beyond it images and then runs are left out.
    """
    sets = [(number, group, _open(group.runs[0].path)) for number, group in enumerate(groups)]
    shown = [(number, group, each) for number, group, each in sets if each is not None]
    if not shown:
        return None
    names = shown[0][2]["class_names"]
    same = [each for each in shown if each[2]["class_names"] == names]
    chosen = np.linspace(0, len(names) - 1, min(CLASSES, len(names))).round().astype(int).tolist()

    def strips(number: int, group: Group, manifest: dict[str, Any], count: int) -> list[Strip]:
        images = _of_classes(group.runs[0].path / "distilled", manifest["units"], chosen, count)
        rows = []
        for place in range(count):
            of_row = [images[label][place] if place < len(images[label]) else None for label in chosen]
            if all(image is None for image in of_row):
                continue
            told = [f"{group.name}: distilled image {place + 1} of {_short(names[label])}" for label in chosen]
            pictures = [_picture(i, alt) if i is not None else None for i, alt in zip(of_row, told, strict=True)]
            rows.append(Strip(number, group.name, pictures))
        return rows

    kept, note = _within(budget, same, PER_CLASS, strips)
    parts = [f"{len(chosen)} of {len(names)} classes" if len(chosen) < len(names) else ""]
    parts.append("other classes: " + ", ".join(e[1].name for e in shown if e not in same) if same != shown else "")
    parts.append("of repetitions, the first" if any(len(group.runs) > 1 for _, group, _ in same) else "")
    return Sheet([_short(names[label]) for label in chosen], kept, "; ".join(filter(None, [*parts, note])))


def film_sheet(groups: Sequence[Group], budget: int = BUDGET) -> Sheet | None:
    """The first images of recovery's first unit as they were at the snapshots and at the end.

    Args:
        groups: the first run of each; those with other snapshots than the first that has some are left out.
        budget: bytes that the pictures may take.
    """
    films = []
    for number, group in enumerate(groups):
        manifest = _open(group.runs[0].path)
        options = read_options(group.runs[0].path)
        steps = [*sorted(options.get("recover.snapshots") or []), options.get("recover.iterations")]
        if manifest and len(steps) > 1:
            snapshots = _snapshots(group.runs[0].path / "distilled" / manifest["units"][0])
            if snapshots is not None and len(snapshots) == len(steps):
                films.append((number, group, (snapshots, steps)))
    if not films:
        return None
    steps = films[0][2][1]
    same = [film for film in films if film[2][1] == steps]

    def strips(number: int, group: Group, film: tuple[NDArray[np.uint8], list[int]], count: int) -> list[Strip]:
        return [
            Strip(
                number,
                group.name,
                [
                    _picture(image, f"{group.name}: image {place + 1} after {step} iterations")
                    for image, step in zip(film[0][:, place], steps, strict=True)
                ],
            )
            for place in range(min(count, film[0].shape[1]))
        ]

    kept, note = _within(budget, same, FILM_IMAGES, strips)
    return Sheet([f"{step:,}" for step in steps], kept, note)


def _within(
    budget: int, films: Sequence[tuple[int, Group, Any]], most: int, strips: Callable[..., list[Strip]]
) -> tuple[list[Strip], str]:
    """As many rows of each run as fit, at most ``most``; where one of each is too much, as many runs as fit."""
    first = strips(*films[0], most)
    row = max(sum(_size(strip) for strip in first) / max(len(first), 1), 1)
    count = max(1, min(most, int(budget / (row * len(films)))))
    kept: list[Strip] = []
    for place, film in enumerate(films):
        more = strips(*film, count)
        if kept and sum(map(_size, [*kept, *more])) > budget:
            return kept, f"the first {place} of {len(films)} runs, so that the page stays small"
        kept += more
    return kept, f"{count} rows per run instead of {most}, so that the page stays small" if count < most else ""


def _size(strip: Strip) -> int:
    return sum(len(picture.source) for picture in strip.pictures if picture)


def _open(run: Path) -> dict[str, Any] | None:
    path = run / "distilled" / "manifest.json"
    if not path.is_file():
        return None
    manifest = read_json(path)
    return manifest if manifest.get("units") and manifest.get("class_names") else None


def _of_classes(
    folder: Path, units: Sequence[str], labels: Sequence[int], count: int
) -> dict[int, list[NDArray[np.uint8]]]:
    """The first images (3, H, W) of some classes; of the files no more is read than holds them."""
    from safetensors import SafetensorError, safe_open

    found: dict[int, list[NDArray[np.uint8]]] = {label: [] for label in labels}
    for name in units:
        if all(len(images) >= count for images in found.values()):
            break
        try:
            with safe_open(folder / name, framework="numpy") as file:
                own, images = file.get_tensor("labels"), file.get_slice("images")
                for label, several in found.items():
                    for place in np.flatnonzero(own == label)[: count - len(several)].tolist():
                        several.append(images[place : place + 1][0])
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{folder / name} cannot be read ({error}); guard verify says what is wrong."
            ) from error
    return found


def _snapshots(path: Path) -> NDArray[np.uint8] | None:
    """The first images of a unit at its snapshots, (snapshots, n, 3, H, W); None where none were taken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names: list[str] = file.keys()
            stored: NDArray[np.uint8] = file.get_tensor("snapshots") if "snapshots" in names else np.zeros(0, np.uint8)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); guard verify says what is wrong.") from error
    return stored[:, :FILM_IMAGES] if stored.ndim == 5 and len(stored) else None


def _picture(image: NDArray[np.uint8], alt: str) -> Picture:
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    target = io.BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(target, "PNG", optimize=True)
    else:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(target, "JPEG", quality=QUALITY)
    kind = "png" if max(picture.size) <= SMALL else "jpeg"
    return Picture(
        f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode()}", picture.width, picture.height, alt
    )


def _short(name: str) -> str:
    """The first of several synonyms, without underscores."""
    return name.split(",")[0].replace("_", " ")
