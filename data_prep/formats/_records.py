"""From an image file to the bytes of one record. Pillow and NumPy alone: ``encode`` runs in forked workers."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.data.beton import BetonLayout
from distill.data.decode import central_square, read_image, resized_shape
from distill.errors import DataError
from distill.randomness import generator

FILTERS = {"longest": Image.Resampling.BICUBIC, "shortest": Image.Resampling.BILINEAR}
"""Nearest to the folder loader when records are tested at 224 pixels. 113 images of ImageNet with longest=400 differ by
1.8 of 255 on average (bilinear 2.1, box 3.4); those with shortest=256 not at all, being the folder loader's own step.
"""


class Source(NamedTuple):
    """An image file, its SHA-256 when it was prepared, and whether its record is to be a JPEG."""

    path: str
    checksum: bytes
    jpeg: bool


class Record(NamedTuple):
    """An image as stored: a JPEG file, or uint8 (height, width, 3)."""

    jpeg: bool
    height: int
    width: int
    content: bytes


def stored_shape(height: int, width: int, layout: BetonLayout) -> tuple[int, int]:
    """Height and width of the record of an image, in pixels."""
    limit = layout.resolution
    if layout.side == "square":
        return limit, limit
    if layout.side == "shortest":
        return resized_shape(height, width, min(limit, height, width))
    longest = max(limit, height, width)
    return max(1, round(height * limit / longest)), max(1, round(width * limit / longest))


def jpeg_records(count: int, layout: BetonLayout) -> NDArray[np.bool_]:
    """Which of the first ``count`` records are JPEG: bool (N,), the same whatever the data set is."""
    if layout.jpeg_share in (0, 1):
        return np.full(count, layout.jpeg_share == 1)
    return generator(0, "jpeg").random(count) < layout.jpeg_share


def encode(source: Source, layout: BetonLayout) -> Record:
    """Decode, resize and encode one image. A JPEG that is no smaller than its pixels gives way to them.

    Raises:
        DataError: naming the file, when it cannot be read or is not the one that was prepared.
    """
    content = Path(source.path).read_bytes() if Path(source.path).is_file() else None
    image = read_image(source.path, content)
    if content is None or hashlib.sha256(content).digest() != source.checksum:
        raise DataError(f"The image {source.path} has changed since it was prepared; restore it.")
    if layout.side == "square":
        square = central_square(image, layout.resolution, layout.resolution)
        image = Image.fromarray(np.ascontiguousarray(square.transpose(1, 2, 0)))
    else:
        height, width = stored_shape(image.height, image.width, layout)
        if (width, height) != image.size:
            image = image.resize((width, height), FILTERS[layout.side])
    pixels = image.tobytes()
    if source.jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=layout.quality, comment=b"")
        if file.tell() < len(pixels):
            return Record(True, image.height, image.width, file.getvalue())
    return Record(False, image.height, image.width, pixels)
