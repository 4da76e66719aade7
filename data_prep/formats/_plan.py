"""What a .beton file will hold, known before it is written."""

from __future__ import annotations

import functools
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.formats._beton_writer import page_size_for
from data_prep.formats._records import Record, Source, encode, jpeg_records, stored_shape
from distill.data.beton import BetonLayout
from distill.data.catalogue import PreparedSet
from distill.data.index import Index
from distill.data.workers import processors, spread

FILES = {"train": "train.beton", "test": "val.beton"}


@dataclass(frozen=True, eq=False)
class Plan:
    """One file of one split.

    Attributes:
        shapes: int64 (N, 2), height and width of every record.
        jpeg: bool (N,), which records are to be JPEG.
    """

    split: str
    root: Path
    index: Index
    layout: BetonLayout
    shapes: NDArray[np.int64]
    jpeg: NDArray[np.bool_]
    page_size: int

    @classmethod
    def of(cls, prepared: PreparedSet, layout: BetonLayout, split: str) -> Plan:
        """Raises ConfigError when a record would be too large."""
        index = prepared.index(split)
        shapes = np.array([stored_shape(height, width, layout) for height, width in index.shapes.tolist()])
        jpeg = jpeg_records(len(index), layout)
        return cls(split, prepared.root, index, layout, shapes, jpeg, page_size_for(shapes))

    @property
    def file(self) -> str:
        """The name of the file."""
        return FILES[self.split]

    @property
    def least(self) -> int:
        """Bytes that the file has at least: those of its pixels."""
        return int(self.shapes.prod(axis=1)[~self.jpeg].sum()) * 3

    def records(self) -> Generator[Record, None, None]:
        """Every record in its order, made by worker processes."""
        sources = (
            Source(str(self.index.path(self.root, i)), self.index.checksums[i].tobytes(), bool(self.jpeg[i]))
            for i in range(len(self.index))
        )
        return spread(functools.partial(encode, layout=self.layout), sources, processors())
