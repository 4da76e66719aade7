"""Real images: scikit-learn's digits, and a few photographs of ../shared/data where that lies beside the checkout."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from data_prep import prepare
from distill.compose import compose
from distill.data.catalogue import PreparedSet

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WORDNET_IDS = ("n01440764", "n02102040", "n03888257")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """1,297 training and 500 test scans."""
    return prepare(compose(["dataset=digits", f"data_root={tmp_path_factory.mktemp('data')}"]))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """ImageNette JPEGs: 3 classes, 8 training and 5 test images of each, referred to where they lie."""
    archive = SHARED / "imagenette_224.zip"
    if not archive.is_file():
        pytest.skip("../shared/data/imagenette_224.zip is not there")
    source = tmp_path_factory.mktemp("imagenette")
    with zipfile.ZipFile(archive) as file:
        for split, count in (("train", 8), ("val", 5)):
            for wordnet_id in WORDNET_IDS:
                names = [name for name in file.namelist() if name.startswith(f"{split}/{wordnet_id}/")]
                file.extractall(source, sorted(names)[:count])
    root = tmp_path_factory.mktemp("data")
    return prepare(
        compose(["dataset=imagenette", "dataset.num_classes=3", f"dataset.source={source}", f"data_root={root}"])
    )
