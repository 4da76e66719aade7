"""Grids of real digits: every image in its place, enlarged without smoothing, with a name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from distill.report.figures import compare_grids, distilled_grid

NAMES = [f"digit_{i}, numeral {i}" for i in range(10)]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    scans, labels = load_digits(return_X_y=True)
    images = torch.tensor(scans * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    return images[:300].contiguous(), torch.tensor(labels[:300])


def places(sheet: Image.Image, image: Tensor, factor: int) -> list[tuple[int, int]]:
    """(row, column) pixels at which an enlarged image stands in the sheet, bit by bit."""
    picture = image.permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
    pixels: NDArray[np.uint8] = np.asarray(sheet)
    height, width = picture.shape[:2]
    probes = [(0, 0), (height // 2, width // 2), (height // 3, width // 2), (height - 1, width - 1), (5, width // 2)]
    space = tuple(extent - size + 1 for extent, size in zip(pixels.shape, (height, width), strict=False))
    fits = np.ones(space, dtype=bool)
    for y, x in probes:
        fits &= (pixels[y : y + space[0], x : x + space[1]] == picture[y, x]).all(-1)
    found = [(int(y), int(x)) for y, x in np.argwhere(fits)]
    return [(y, x) for y, x in found if np.array_equal(pixels[y : y + height, x : x + width], picture)]


def test_one_row_per_class_in_order(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = digits
    sheet = distilled_grid(images, labels, NAMES, tmp_path / "report" / "distilled.png", per_class=3)
    rows, columns = [], []
    for label in range(10):
        found = [places(sheet, image, 2) for image in images[labels == label][:3]]
        assert all(len(place) == 1 for place in found)
        assert len({place[0][0] for place in found}) == 1, "one row"
        rows.append(found[0][0][0])
        columns.append([place[0][1] for place in found])
    assert np.diff(rows).tolist() == [68] * 9
    assert columns == [columns[0]] * 10
    assert np.diff(columns[0]).tolist() == [68, 68]
    assert places(sheet, images[labels == 0][3], 2) == []
    names = np.asarray(sheet.convert("L"))[:, : columns[0][0] - 1]
    for row in rows:
        assert (names[row : row + 64] < 100).sum() > 50, "letters beside every row"
    with Image.open(tmp_path / "report" / "distilled.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(sheet))
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["distilled.png"]


def test_many_classes_are_sampled_and_large_images_shrunk(digits: tuple[Tensor, Tensor]) -> None:
    images = torch.nn.functional.interpolate(digits[0][:200].float(), size=224).to(torch.uint8)
    sheet = distilled_grid(
        images, torch.arange(200) * 5, [f"n{i:08d} a_long_name" for i in range(1000)], max_classes=20
    )
    assert sheet.height == pytest.approx(20 * 164, abs=60)
    assert sheet.width < 500


def test_sets_stand_above_each_other(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = digits
    sets = {"SRe²L": (images[:100], labels[:100]), "GUARD": (images[100:], labels[100:])}
    sheet = compare_grids(sets, NAMES, tmp_path / "compare.png", per_class=2)
    first, second = (
        [places(sheet, part[0][part[1] == label][0], 3)[0] for label in range(10)] for part in sets.values()
    )
    assert len({y for y, _ in first}) == len({y for y, _ in second}) == 1
    assert second[0][0] - first[0][0] == 2 * 100, "two rows of 96 pixels and their gaps"
    assert [x for _, x in first] == [x for _, x in second]
    assert np.diff([x for _, x in first]).tolist() == [100] * 9
    assert (tmp_path / "compare.png").is_file()


def test_a_missing_image_leaves_its_place_empty(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    kept = labels != 4
    sheet = compare_grids({"all": digits, "no four": (images[kept], labels[kept])}, NAMES)
    five = [places(sheet, image[label == 5][0], 3) for image, label in (digits, (images[kept], labels[kept]))]
    assert five[0] == five[1]
    assert len(five[0]) == 2
    assert five[0][0][1] == five[0][1][1], "the column of five did not move"
