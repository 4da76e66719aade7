"""Image files with labels, in a fixed order, and seeded choices of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.data.index import Index
from distill.randomness import generator


@dataclass(frozen=True)
class ClassInfo:
    """One class: its folder, its name for people, and its index in ImageNet-1K where the folder is a WordNet id."""

    folder: str
    name: str
    imagenet_index: int | None = None


@dataclass(frozen=True, eq=False)
class Samples:
    """Image files with labels, in a fixed order.

    Attributes:
        root: folder of the images.
        index: their names, labels and checksums.
        classes: in label order.
        split: "train", "validation" or "test".
        rows: int64 (N,), positions in the whole index of ``stored``.
    """

    root: Path
    index: Index
    classes: list[ClassInfo]
    split: str
    rows: NDArray[np.int64]

    @property
    def stored(self) -> str:
        """The stored split that the samples are part of: "train" or "test"."""
        return "test" if self.split == "test" else "train"

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 (N,)."""
        return self.index.labels

    @property
    def paths(self) -> list[Path]:
        """Every file; for millions of them ask for one at a time with ``path``."""
        return [self.path(position) for position in range(len(self))]

    def path(self, position: int) -> Path:
        """The file of one sample."""
        return self.index.path(self.root, position)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over labels and image bytes, in order."""
        hasher = hashlib.sha256()
        self.index.update(hasher)
        return hasher.hexdigest()

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Some of the samples, in the given order."""
        return replace(self, index=self.index.take(positions), rows=self.rows[positions])

    def choose(self, count: int, seed: int) -> Samples:
        """A seeded choice, balanced over the classes; 0, or more than there are, means all.

        A smaller choice is part of every larger one. The samples keep the order of the whole.
        """
        if count <= 0 or count >= len(self):
            return self
        turn = np.empty(len(self), dtype=np.int64)
        for label, members in by_class(self.labels, len(self.classes)):
            turn[generator(seed, "choice", label).permutation(members)] = np.arange(len(members))
        # In each turn every class gives one image; the classes take their turn in a seeded order.
        seat = generator(seed, "choice-classes").permutation(len(self.classes))
        chosen = np.lexsort((seat[self.labels], turn))[:count]
        return self.take(np.sort(chosen))


def by_class(labels: NDArray[np.int64], count: int) -> list[tuple[int, NDArray[np.int64]]]:
    """(label, ascending positions of its samples) of every class."""
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.searchsorted(labels[order], np.arange(1, count)))
    return list(enumerate(parts))
