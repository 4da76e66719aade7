"""Pictures of distilled images with the names of their classes."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill.files import write_atomic

GAP = 4
"""Pixels between images."""
LARGEST = 160
"""Height in pixels to which larger images are shrunk."""
TEXT = 15
"""Height of the letters in pixels."""


def distilled_grid(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    path: Path | None = None,
    *,
    per_class: int = 10,
    max_classes: int = 20,
) -> Image.Image:
    """One row per class: its name, then its images.

    Args:
        images: uint8 (N, 3, H, W); small ones are enlarged by a whole factor without smoothing.
        labels: int64 (N,), positions in ``class_names``.
        path: PNG file, written atomically; None writes none.
        per_class: show the first so many images of each class.
        max_classes: of more classes, so many are shown, evenly spaced; a line below says so.
    """
    shown = _sample(labels, max_classes)
    rows = [(_readable(class_names[label]), _of_class(images, labels, label)[:per_class]) for label in shown]
    classes = len(labels.unique())
    note = f"{len(shown)} of {classes} classes, " if len(shown) < classes else ""
    left = max(len(_of_class(images, labels, label)) for label in shown) > per_class
    note += f"the first {per_class} images of each" if left else "all images of each" if note else ""
    return _saved(_drawn(rows, [], note, smallest=64), path)


def compare_grids(
    sets: Mapping[str, tuple[Tensor, Tensor]],
    class_names: Sequence[str],
    path: Path | None = None,
    *,
    per_class: int = 1,
    max_classes: int = 10,
) -> Image.Image:
    """Several sets above each other, one column per class (as figure 3 of the paper).

    Args:
        sets: name → images uint8 (N, 3, H, W), all of one size, and labels int64 (N,); the first chooses the classes.
        path: PNG file, written atomically; None writes none.
        per_class: rows of each set.
        max_classes: columns.
    """
    shown = _sample(next(iter(sets.values()))[1], max_classes)
    rows = []
    for name, (images, labels) in sets.items():
        columns = [_of_class(images, labels, label) for label in shown]
        blank = np.full((*images.shape[2:], 3), 255, dtype=np.uint8)
        for row in range(per_class):
            line = [column[row] if row < len(column) else blank for column in columns]
            rows.append((_readable(name) if row == 0 else "", line))
    header = [_readable(class_names[label]) for label in shown]
    return _saved(_drawn(rows, header, "", smallest=96), path)


def _sample(labels: Tensor, count: int) -> list[int]:
    """Labels that occur, at most ``count`` of them, evenly spaced."""
    present = labels.unique().tolist()
    chosen = np.linspace(0, len(present) - 1, min(count, len(present))).round().astype(int)
    return [present[position] for position in chosen]


def _of_class(images: Tensor, labels: Tensor, label: int) -> list[NDArray[np.uint8]]:
    """Images of one class in their order, each uint8 (H, W, 3)."""
    return list(images[labels == label].permute(0, 2, 3, 1).cpu().numpy())


def _readable(name: str) -> str:
    """The first of several synonyms, without underscores, and without characters that the font lacks, such as ²."""
    return unicodedata.normalize("NFKC", name.split(",")[0].replace("_", " "))


def _drawn(rows: list[tuple[str, list[NDArray[np.uint8]]]], header: list[str], note: str, smallest: int) -> Image.Image:
    """Names at the left of the rows and above the columns, a note below."""
    font = ImageFont.load_default(size=TEXT)
    cells = [[_resized(image, smallest) for image in images] for _, images in rows]
    width, height = next(image.size for line in cells for image in line)
    titles = [_wrapped(text, font, width) for text in header]
    names = [_fitted(name, font, 12 * TEXT) for name, _ in rows]
    left = round(max(font.getlength(name) for name in names)) + 2 * GAP
    top = max((len(lines) for lines in titles), default=0) * (TEXT + GAP) + 2 * GAP
    bottom = TEXT + 2 * GAP if note else 0
    total = left + max(len(line) for line in cells) * (width + GAP), top + len(rows) * (height + GAP) + bottom
    sheet = Image.new("RGB", (max(total[0], round(font.getlength(note)) + 2 * GAP), total[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(titles):
        middle = left + column * (width + GAP) + width / 2
        for line, text in enumerate(reversed(lines)):
            pen.text((middle, top - 2 * GAP - line * (TEXT + GAP)), text, "black", font, anchor="ms")
    for row, (name, line_of_images) in enumerate(zip(names, cells, strict=True)):
        y = top + row * (height + GAP)
        pen.text((GAP, y + height / 2), name, "black", font, anchor="lm")
        for column, image in enumerate(line_of_images):
            sheet.paste(image, (left + column * (width + GAP), y))
    pen.text((GAP, total[1] - GAP), note, "dimgray", font, anchor="lb")
    return sheet


def _resized(image: NDArray[np.uint8], smallest: int) -> Image.Image:
    picture = Image.fromarray(image)
    factor = -(-smallest // picture.height)
    if factor > 1:
        return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    if picture.height > LARGEST:
        return picture.resize((round(picture.width * LARGEST / picture.height), LARGEST), Image.Resampling.LANCZOS)
    return picture


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """One or two lines of at most so many pixels."""
    words = text.split()
    count = len(words)
    while count > 1 and font.getlength(" ".join(words[:count])) > width:
        count -= 1
    return [_fitted(" ".join(part), font, width) for part in (words[:count], words[count:]) if part]


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _saved(picture: Image.Image, path: Path | None) -> Image.Image:
    if path is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
    return picture
