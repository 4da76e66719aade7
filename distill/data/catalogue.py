"""Prepared data sets: what ``guard prepare`` made of real images, and the samples of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.index import Index
from distill.data.samples import ClassInfo, Samples, by_class
from distill.errors import ConfigError, DataError
from distill.randomness import generator

FORMAT, VERSION = "guard-dataset", 2


class PreparedSet:
    """A complete prepared folder. Make one with ``data_prep.prepare``, find one again with ``open``."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.name: str = manifest["name"]
        self.classes = [ClassInfo(**entry) for entry in manifest["classes"]]
        self.fingerprint: str = manifest["fingerprint"]
        self.root = folder / manifest["images"]
        self._indices: dict[str, Index] = {}

    @classmethod
    def open(cls, folder: Path) -> PreparedSet:
        """Open the folder ``data_root/<dataset.name>``.

        Raises:
            DataError: when it is not prepared, its manifest is damaged, or the images that it refers to are gone.
        """
        prepared = cls(folder, read_manifest(folder))
        if not prepared.root.is_dir():
            raise DataError(
                f"The images of {prepared.name} are no longer in {prepared.root}; "
                f"run guard prepare with dataset.source set to where they are now."
            )
        return prepared

    @property
    def splits(self) -> list[str]:
        """The splits that are stored: "train" and, where the source has one, "test"."""
        return sorted(self.manifest["splits"], reverse=True)

    def describe(self) -> str:
        """One line for people: where it lies, how many classes and images, how many were left out."""
        counts = ", ".join(f"{self.manifest['splits'][split]['images']} {split}" for split in self.splits)
        skipped = self.manifest["corrupt"]["count"]
        left_out = f", {skipped} unreadable left out" if skipped else ""
        formats = [file.parent.name for file in sorted(self.folder.glob("*/manifest.json"))]
        stored = f", stored as {', '.join(formats)}" if formats else ""
        return f"{self.folder}: {len(self.classes)} classes, {counts} images{left_out}{stored}."

    def index(self, split: str) -> Index:
        """The whole index of "train" or "test". Raises DataError when the data set has none, or it is damaged."""
        if split not in self.manifest["splits"]:
            raise DataError(f"The data set {self.name} has no {split} split; prepare it from a source that holds one.")
        if split not in self._indices:
            self._indices[split] = Index.load(self.folder, self.manifest["splits"][split]["index"])
        return self._indices[split]

    def samples(self, split: str, *, max_per_class: int = 0, validation_per_class: int = 0, seed: int = 0) -> Samples:
        """The samples of one split.

        Args:
            split: "train", "test", or "validation": ``validation_per_class`` images of each class held out of train.
            max_per_class: use this many training images of each class, a seeded choice of what is not held out; 0: all.
            seed: of both choices. A smaller ``max_per_class`` is part of a larger one.

        Raises:
            ConfigError: when a class has too few images to hold that many out.
            DataError: when the data set has no such split.
        """
        if split == "test":
            whole = self.index("test")
            return Samples(self.root, whole, self.classes, split, np.arange(len(whole)))
        if split == "validation" and not validation_per_class:
            raise ConfigError("The validation split needs dataset.validation_per_class of at least 1.")
        whole, kept = self.index("train"), []
        for label, members in by_class(whole.labels, len(self.classes)):
            if validation_per_class >= len(members):
                raise ConfigError(
                    f"dataset.validation_per_class={validation_per_class} leaves nothing to train on: class "
                    f"{self.classes[label].folder} has {len(members)} training images."
                )
            members = generator(seed, "validation", label).permutation(members)
            if split == "validation":
                kept.append(members[:validation_per_class])
                continue
            rest = generator(seed, "subset", label).permutation(members[validation_per_class:])
            kept.append(rest[: max_per_class or None])
        rows = np.sort(np.concatenate(kept))
        return Samples(self.root, whole.take(rows), self.classes, split, rows)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises DataError when it has none, or a damaged one."""
    file = folder / "manifest.json"
    if not file.is_file():
        raise DataError(f"{folder} holds no prepared data set; run guard prepare with the same dataset options first.")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        form = (manifest["format"], manifest["version"])
        missing = {"name", "classes", "splits", "corrupt", "images", "source", "fingerprint"} - set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged; remove it and run guard prepare again.") from error
    if form != (FORMAT, VERSION) or missing:
        raise DataError(f"{file} is not of format {FORMAT} version {VERSION}; remove {folder} and prepare it again.")
    return manifest
