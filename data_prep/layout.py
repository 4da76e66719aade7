"""The ImageFolder layout: which files of a folder are training and test images, and of which class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.errors import DataError
from distill.files import printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Folders that may hold the test images, the first one with class folders is taken."""
ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's list of the classes of ``val/images``."""


@dataclass(frozen=True)
class Layout:
    """The images of an ImageFolder tree.

    Attributes:
        classes: folder names, sorted: the class order.
        files: split → (path relative to the root, label), by class and then by name.
        folders: split → name of its folder.
    """

    classes: list[str]
    files: dict[str, list[tuple[str, int]]]
    folders: dict[str, str]


def is_image(name: str) -> bool:
    """Whether a file name is that of an image; hidden files are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def find_root(folder: Path) -> Path:
    """The folder that holds ``train/``: the given one, or the only one directly inside it that does.

    Raises:
        DataError: when there is none.
    """
    if (folder / "train").is_dir():
        return folder
    inside = [child for child in sorted(folder.iterdir()) if (child / "train").is_dir()]
    if len(inside) != 1:
        raise DataError(f"{folder} holds no folder train with one folder of images for each class.")
    return inside[0]


def scan(root: Path) -> Layout:
    """List the images below ``root``.

    Raises:
        DataError: when a split has no class folders, a class has no images, or the splits have different classes.
    """
    folders = {"train": "train"}
    found = {"train": _split(root, "train")}
    for name in TEST_FOLDERS:
        classes = _split(root, name)
        if classes:
            folders["test"], found["test"] = name, classes
            break
    if not found["train"]:
        raise DataError(f"{root / 'train'} holds no class folders.")
    order = sorted(found["train"])
    for name in order:
        if name != printable(name):
            raise DataError(f"{root / 'train'} has the class folder {name!r}, whose name is no UTF-8; rename it.")
    for split, classes in found.items():
        _check_classes(root / folders[split], order, classes)
    label = {name: position for position, name in enumerate(order)}
    files = {
        split: [(path, label[name]) for name in order for path in classes[name]] for split, classes in found.items()
    }
    return Layout(order, files, folders)


def listing_signature(root: Path) -> str:
    """SHA-256 over names and sizes of all images below ``train/`` and the test folders; reads no image."""
    hasher = hashlib.sha256()
    for split in ("train", *TEST_FOLDERS):
        for path in sorted(images_below(root, root / split)):
            hasher.update(f"{path}\t{_size(root / path)}\n".encode(errors="surrogateescape"))
    return hasher.hexdigest()


def _size(path: Path) -> int:
    """Bytes of a file; a link that leads nowhere is told later, with the images that cannot be read."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _split(root: Path, name: str) -> dict[str, list[str]]:
    """Class folder → sorted paths of its images; empty when there is no such split."""
    folder = root / name
    if not folder.is_dir():
        return {}
    if (folder / ANNOTATIONS).is_file():
        return _annotated(root, folder)
    classes = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    if [child.name for child in classes] == ["images"]:  # Tiny ImageNet's test images have no labels.
        return {}
    return {child.name: sorted(images_below(root, child)) for child in classes}


def images_below(root: Path, folder: Path) -> Iterator[str]:
    """Paths, relative to ``root``, of all images at any depth below ``folder``."""
    for parent, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(parent, root)
        yield from (os.path.join(below, name) for name in names if is_image(name))


def _annotated(root: Path, folder: Path) -> dict[str, list[str]]:
    classes: dict[str, list[str]] = {}
    for number, line in enumerate((folder / ANNOTATIONS).read_text().splitlines(), 1):
        name, _, rest = line.partition("\t")
        if not rest or "/" in name or not is_image(name):
            raise DataError(f"Line {number} of {folder / ANNOTATIONS} is not IMAGE<TAB>CLASS….")
        path = folder / "images" / name
        classes.setdefault(rest.split("\t")[0], []).append(os.path.relpath(path, root))
    return {name: sorted(paths) for name, paths in classes.items()}


def _check_classes(folder: Path, order: list[str], classes: dict[str, list[str]]) -> None:
    for text, names in (
        ("has no folder of class", sorted(set(order) - set(classes))),
        ("has classes that train has not:", sorted(set(classes) - set(order))),
        ("has no image of class", [name for name in order if not classes.get(name)]),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise DataError(f"{folder} {text} {', '.join(names[:5])}{more}; every split must hold the same classes.")
