"""Images of a folder, referred to where they are or copied, or of a zip or tar archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.archive import archive_signature, extract, is_archive
from data_prep.layout import ANNOTATIONS, TEST_FOLDERS, find_root, images_below, listing_signature
from data_prep.target import copy_stream, filling
from distill.config import DatasetConfig
from distill.errors import ConfigError, DataError
from distill.progress import Progress


def identity(dataset: DatasetConfig) -> dict[str, Any]:
    """Names and sizes of the images of a folder; or the signature of an archive.

    Raises:
        ConfigError: when ``dataset.source`` is not set.
        DataError: when it does not exist, or is neither folder nor archive.
    """
    source = _source(dataset)
    if source.is_dir():
        return {"kind": "folder", "signature": listing_signature(find_root(source))}
    if not is_archive(source):
        raise DataError(f"dataset.source={dataset.source} is neither a folder nor a readable zip or tar archive.")
    return {"kind": "archive", "signature": archive_signature(source)}


def fetch(dataset: DatasetConfig, folder: Path) -> Path:
    """The folder itself, or its copy or the extracted archive in ``folder/images``."""
    source = _source(dataset)
    if source.is_dir() and not dataset.copy:
        return find_root(source).resolve()
    with filling(folder) as images:
        if source.is_dir():
            _copy(find_root(source), images)
        else:
            extract(source, images)
    return find_root(folder / "images")


def _source(dataset: DatasetConfig) -> Path:
    if not dataset.source:
        raise ConfigError(
            f"The data set {dataset.name} is not prepared yet, and dataset.source is not set; "
            f"set it to a folder or a zip or tar archive with train/CLASS/IMAGE."
        )
    source = Path(dataset.source).expanduser()
    if not source.exists():
        raise DataError(f"dataset.source={dataset.source} does not exist.")
    return source


def _copy(root: Path, images: Path) -> None:
    names = [name for split in ("train", *TEST_FOLDERS) for name in images_below(root, root / split)]
    names += [str(path.relative_to(root)) for path in root.glob(f"*/{ANNOTATIONS}")]
    with Progress(len(names), "copy", "file") as progress:
        for name in names:
            if not (root / name).exists():
                raise DataError(f"{root / name} is a link that leads nowhere; repair or remove it.")
            with open(root / name, "rb") as file:
                copy_stream(file, images / name)
            progress.update()
