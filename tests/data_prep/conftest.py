"""Small ImageFolder trees of real images: digits, and photographs of ../shared/data where it is beside the checkout."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from distill.compose import compose
from distill.config import Config

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WORDNET_IDS = ("n01440764", "n02102040", "n03888257")


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """A function that composes a configuration whose data lie in a folder of the test."""
    return lambda *overrides: compose([f"data_root={tmp_path / 'data'}", *overrides])


@pytest.fixture
def own(configure: Callable[..., Config]) -> Callable[..., Config]:
    """The same for a data set of three classes, "own", from a source."""
    return lambda source, *overrides: configure(
        "dataset.name=own", "dataset.num_classes=3", f"dataset.source={source}", *overrides
    )


def write_scans(
    root: Path, splits: dict[str, int], classes: Sequence[str] = ("ant", "bee", "cat"), start: int = 0
) -> Path:
    """Write real scans as root/SPLIT/CLASS/NUMBER.png; ``splits`` gives the number of images of each class."""
    digits = load_digits()
    for split, count in splits.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in np.flatnonzero(digits.target == label)[start : start + count]:
                Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(
                    root / split / name / f"{number}.png"
                )
        start += count
    return root


@pytest.fixture
def scans() -> Callable[..., Path]:
    """``write_scans``."""
    return write_scans


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/ and test/ of three classes, 6 and 3 images of each."""
    return write_scans(tmp_path / "tree", {"train": 6, "test": 3})


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip archive: 3 classes of ImageNette, 6 training and 3 test images of each."""
    if not (SHARED / "imagenette_224.zip").is_file():
        pytest.skip("../shared/data/imagenette_224.zip is not there")
    path = tmp_path_factory.mktemp("archive") / "imagenette.zip"
    with zipfile.ZipFile(SHARED / "imagenette_224.zip") as whole, zipfile.ZipFile(path, "w") as part:
        for folder, count in (("train", 6), ("val", 3)):
            for wordnet_id in WORDNET_IDS:
                names = sorted(name for name in whole.namelist() if name.startswith(f"{folder}/{wordnet_id}/"))
                for name in names[:count]:
                    part.writestr(name, whole.read(name))
    return path


@pytest.fixture
def pack() -> Callable[..., Path]:
    """A function that puts a tree into a zip archive, below a folder ``top``."""

    def put(tree: Path, path: Path, top: str = "") -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(tree.rglob("*")):
                if file.is_file():
                    archive.write(file, Path(top) / file.relative_to(tree))
        return path

    return put
