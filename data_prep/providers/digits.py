"""Scikit-learn's digits: 1,797 real 8x8 scans that come with the package; no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.target import filling
from distill.config import DatasetConfig
from distill.data.samples import by_class
from distill.randomness import generator

TEST_PER_CLASS = 50
SPLIT_SEED = 0
"""Fixed here and no option, so that the data set is one thing."""


def identity(dataset: DatasetConfig) -> dict[str, Any]:
    """The package has one set of digits."""
    return {"kind": "digits", "test_per_class": TEST_PER_CLASS, "split_seed": SPLIT_SEED}


def fetch(dataset: DatasetConfig, folder: Path) -> Path:
    """Write the scans as 8-bit grey PNG files, 0..16 scaled to 0..255: 500 test images, 1,297 training images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    with filling(folder) as images:
        for label, members in by_class(digits.target, 10):
            chosen = generator(SPLIT_SEED, "digits", label).permutation(members)
            for split, part in (("test", chosen[:TEST_PER_CLASS]), ("train", chosen[TEST_PER_CLASS:])):
                (images / split / str(label)).mkdir(parents=True)
                for number in part:
                    # Without compression the bytes do not depend on the version of zlib.
                    Image.fromarray(pixels[number]).save(
                        images / split / str(label) / f"{number:04d}.png", compress_level=0
                    )
    return folder / "images"
