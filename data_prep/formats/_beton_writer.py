"""FFCV's file format, version 2, written from one end to the other.

A file is a header, a description of each field, the metadata of each record; then pages of equal size, at multiples of
it, with whole records one after another; and a table with place and size of each record.
"""

from __future__ import annotations

import hashlib
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.formats._records import Record
from distill.data.ffcv_loader import library
from distill.errors import ConfigError

SMALLEST_PAGE, LARGEST_PAGE = 1 << 21, 1 << 31
RECORDS_PER_PAGE = 8
"""A page holds at least this many of the largest records."""
LARGEST_SIDE = 65500
"""In pixels; libjpeg's limit."""


def page_size_for(shapes: NDArray[np.int64]) -> int:
    """The page size, in bytes, for records of these heights and widths, int64 (N, 2).

    Raises:
        ConfigError: when the largest one has no place in a .beton file.
    """
    pixels = shapes.prod(axis=1)
    wanted = max(SMALLEST_PAGE, RECORDS_PER_PAGE * int(pixels.max()) * 3)
    if shapes.max() > LARGEST_SIDE or wanted > LARGEST_PAGE:
        height, width = shapes[pixels.argmax() if wanted > LARGEST_PAGE else shapes.max(axis=1).argmax()]
        raise ConfigError(
            f"A record of {width} x {height} pixels is too large for a .beton file, which takes sides of up to "
            f"{LARGEST_SIDE} pixels and {LARGEST_PAGE // RECORDS_PER_PAGE >> 20} MiB; set a smaller format.resolution "
            f"or format.side=longest."
        )
    return 1 << (wanted - 1).bit_length()


class BetonWriter:
    """Writes the fields ``image`` (RGBImageField) and ``label`` (IntField) of records that are added in their order.

    Args:
        file: empty, open for writing, buffered: a raw file may write less than it is given.
        labels: int64 (N,), of all records that will be added.
        page_size: in bytes, a power of two that no record exceeds.

    Raises:
        MissingPackageError: FFCV is not installed.
    """

    def __init__(self, file: BinaryIO, labels: NDArray[np.int64], page_size: int):
        ffcv = library()
        fields: dict[str, Any] = {"image": ffcv.fields.RGBImageField(), "label": ffcv.fields.IntField()}
        numbers = {kind: number for number, kind in ffcv.types.TYPE_ID_HANDLER.items()}
        self.modes = {jpeg: ffcv.fields.rgb_image.IMAGE_MODES["jpg" if jpeg else "raw"] for jpeg in (False, True)}
        self.described = np.zeros(len(fields), ffcv.types.FieldDescType)
        for row, (name, field) in zip(self.described, fields.items(), strict=True):
            row["type_id"] = numbers[type(field)]
            row["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
            row["arguments"][:] = field.to_binary()[0]
        self.metadata = np.zeros(len(labels), ffcv.types.get_metadata_type(list(fields.values())))
        self.images, label_column = (self.metadata[name] for name in self.metadata.dtype.names or ())
        label_column[:] = labels
        self.table = np.zeros(len(labels), ffcv.types.ALLOC_TABLE_TYPE)
        self.header = np.zeros(1, ffcv.types.HeaderType)
        for name, value in (
            ("version", ffcv.types.CURRENT_VERSION),
            ("num_fields", len(fields)),
            ("page_size", page_size),
            ("num_samples", len(labels)),
        ):
            self.header[name] = value
        self.file, self.page_size, self.count, self.hasher = file, page_size, 0, hashlib.sha256()
        before = self.header.nbytes + self.described.nbytes + self.metadata.nbytes
        self.start = self.place = before + -before % page_size
        file.seek(self.start)

    def add(self, record: Record) -> None:
        """Write the next record, into the next page when this one has no room for it."""
        size = len(record.content)
        if self.place % self.page_size + size > self.page_size:
            self._end_page()
        self.images[self.count] = (self.modes[record.jpeg], record.width, record.height, self.place)
        self.table[self.count] = (self.count, self.place, size)
        self._write(record.content)
        self.count += 1

    def finish(self) -> dict[str, Any]:
        """Write all but the images; returns ``bytes``, ``records`` and what the manifest says of the images."""
        assert self.count == len(self.table), "fewer records than labels"
        self._end_page()
        self.header["alloc_table_ptr"] = self.place
        self.file.write(self.table.tobytes())
        self.file.seek(0)
        for part in (self.header, self.described, self.metadata):
            self.file.write(part.tobytes())
        return {
            "records": self.count,
            "bytes": self.place + self.table.nbytes,
            "data_start": self.start,
            "data_end": self.place,
            "data_sha256": self.hasher.hexdigest(),
        }

    def _end_page(self) -> None:
        self._write(bytes(-self.place % self.page_size))

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.hasher.update(content)
        self.place += len(content)
