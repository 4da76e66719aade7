"""Data sets that torchvision downloads: CIFAR10 and CIFAR100, written out as PNG, and Imagenette's JPEG files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.layout import find_root
from data_prep.target import filling
from distill.config import DatasetConfig
from distill.errors import ConfigError, DataError
from distill.progress import Progress

CLASSES = ("CIFAR10", "CIFAR100", "Imagenette")


def identity(dataset: DatasetConfig) -> dict[str, Any]:
    """The class of ``torchvision.datasets``. Raises ConfigError when it is not one of ``CLASSES``."""
    if dataset.torchvision_class not in CLASSES:
        raise ConfigError(
            f"dataset.torchvision_class={dataset.torchvision_class} is not one of: {', '.join(CLASSES)}; "
            f"other data sets are prepared with dataset.source."
        )
    return {"kind": "torchvision", "class": dataset.torchvision_class}


def fetch(dataset: DatasetConfig, folder: Path) -> Path:
    """Download, then make ``folder/images``. A finished download is not repeated after an interruption.

    Raises:
        DataError: when the download fails.
    """
    download = folder / "download"
    # Torchvision takes any extracted folder for a whole one; the archives beside it are checked by their MD5.
    for child in download.iterdir() if download.is_dir() else ():
        if child.is_dir():
            shutil.rmtree(child)
    with filling(folder) as images:
        if dataset.torchvision_class == "Imagenette":
            _load(dataset, download, split="train")
            root = find_root(download)
            for split in ("train", "val"):
                (root / split).rename(images / split)
        else:
            for split in ("train", "test"):
                _write(_load(dataset, download, train=split == "train"), images / split)
    shutil.rmtree(download, ignore_errors=True)
    return folder / "images"


def _load(dataset: DatasetConfig, download: Path, **split: Any) -> Any:
    from torchvision import datasets

    try:
        return getattr(datasets, dataset.torchvision_class)(str(download), download=True, **split)
    except (OSError, RuntimeError) as error:  # URLError is an OSError.
        raise DataError(
            f"torchvision could not download {dataset.torchvision_class} ({str(error).rstrip('.')}); "
            f"get it elsewhere and pass dataset.source=FOLDER_OR_ARCHIVE in ImageFolder layout."
        ) from error


def _write(data: Any, folder: Path) -> None:
    """Write the arrays of a CIFAR class, uint8 (N, 32, 32, 3), as folder/CLASS/NUMBER.png."""
    for name in data.classes:
        (folder / name).mkdir(parents=True)
    with Progress(len(data.data), f"write {folder.name}", "image") as progress:
        for number, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
            Image.fromarray(pixels).save(folder / data.classes[label] / f"{number:05d}.png")
            progress.update()
