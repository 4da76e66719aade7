"""Check every image of a source and freeze what was found: class order, indices, manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.checks import Finding, inspect_image, name_some
from data_prep.layout import Layout, scan
from distill.config import DatasetConfig
from distill.data.catalogue import FORMAT, VERSION
from distill.data.imagenet import imagenet_classes
from distill.data.index import Index, fingerprint
from distill.data.workers import processors, spread
from distill.errors import ConfigError, DataError
from distill.files import printable, write_json
from distill.progress import Progress


def freeze(folder: Path, root: Path, dataset: DatasetConfig, identity: dict[str, Any], source: str) -> None:
    """Check the images below ``root`` and write indices and manifest; from then on ``folder`` is complete.

    Args:
        identity: what the images are known by, see ``data_prep.providers``.
        source: where they came from, for people.

    Raises:
        ConfigError: when there are not ``dataset.num_classes`` classes.
        DataError: when splits and classes do not fit each other, or images are unreadable and
            ``dataset.on_corrupt=error``: it names up to five of them.
    """
    layout = scan(root)
    check_count(len(layout.classes), dataset, dataset.source or str(root))
    indices, corrupt = _check_images(root, layout, dataset)
    if folder in root.parents:
        os.sync()  # A lost machine must not leave a manifest on disk without the images that were written before it.
    wordnet = imagenet_classes()
    classes = []
    for name in layout.classes:
        number, title = wordnet.get(name, (None, name))
        classes.append({"folder": name, "name": title, "imagenet_index": number})
    splits = {}
    for split, index in indices.items():
        counts = np.bincount(index.labels, minlength=len(classes)).tolist()
        splits[split] = {
            "images": len(index),
            "per_class": counts,
            "folder": layout.folders[split],
            "index": index.save(folder / f"{split}.safetensors"),
        }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": dataset.name,
        "classes": classes,
        "splits": splits,
        "corrupt": {"count": len(corrupt), "files": corrupt},
        "images": place_of(root, folder),
        "source": {"identity": identity, "path": source},
        "fingerprint": fingerprint(layout.classes, indices),
    }
    write_json(folder / "manifest.json", manifest)


def place_of(root: Path, folder: Path) -> str:
    """What a manifest calls the folder of the images: relative to its own folder where they lie inside it."""
    return root.relative_to(folder).as_posix() if folder in root.parents else str(root)


def _check_images(root: Path, layout: Layout, dataset: DatasetConfig) -> tuple[dict[str, Index], list[str]]:
    """The index of the readable images of every split, and the paths of the others."""
    paths = [path for files in layout.files.values() for path, _ in files]
    with Progress(len(paths), "check", "image") as progress:
        findings: list[Finding] = []
        for finding in spread(inspect_image, [os.path.join(root, path) for path in paths], processors()):
            findings.append(finding)
            progress.update()
    faults = {path: finding.fault for path, finding in zip(paths, findings, strict=True) if finding.fault}
    if faults and dataset.on_corrupt == "error":
        count = "1 image is" if len(faults) == 1 else f"{len(faults)} images are"
        named = name_some([f"{root / path} {text}" for path, text in faults.items()])
        raise DataError(f"{count} unreadable: {named}; repair or remove them, or pass dataset.on_corrupt=skip.")
    indices, start = {}, 0
    for split, files in layout.files.items():
        part = findings[start : start + len(files)]
        start += len(files)
        good = [(path, label, found) for (path, label), found in zip(files, part, strict=True) if not found.fault]
        labels = np.array([label for _, label, _ in good], dtype=np.int64)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(layout.classes)) == 0)
        if len(empty):
            raise DataError(
                f"{root / layout.folders[split]} has no readable image of class {layout.classes[empty[0]]}."
            )
        indices[split] = Index(
            np.array([os.fsencode(path) for path, _, _ in good]),
            labels,
            np.array([found.size for _, _, found in good], dtype=np.int64),
            np.frombuffer(b"".join(found.checksum for _, _, found in good), dtype=np.uint8).reshape(-1, 32).copy(),
            np.array([found.shape for _, _, found in good], dtype=np.int64),
            np.array([found.plain for _, _, found in good]),
        )
    return indices, sorted(map(printable, faults))


def check_count(count: int, dataset: DatasetConfig, place: str) -> None:
    """Raise ConfigError when a place does not hold ``dataset.num_classes`` classes."""
    if count != dataset.num_classes:
        raise ConfigError(
            f"dataset.num_classes={dataset.num_classes}, but {place} has {count} classes; "
            f"set dataset.num_classes={count}, or choose another source."
        )
