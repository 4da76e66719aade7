"""From an image file to RGB bytes. Pillow alone: these functions run in forked workers, where torch must not."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distill.errors import DataError

EVALUATION_MARGIN = 256 / 224
"""The shorter side before the central crop of evaluation, relative to the crop."""


def read_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Decode a whole file to RGB: grey and palette are expanded, CMYK converted, 16-bit grey scaled, alpha dropped.

    Args:
        content: the bytes of the file, if they have been read.

    Raises:
        DataError: naming the file, when it is missing or not fully decodable.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds.
        raise DataError(
            f"The image {os.fspath(path)} {fault(error)}; restore it, or prepare the data set again "
            f"(dataset.on_corrupt=skip leaves such images out)."
        ) from error


def fault(error: Exception) -> str:
    """What is wrong with an image file, from what Pillow raised."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, UnidentifiedImageError):
        return "is in no image format that Pillow knows"
    return f"cannot be decoded ({str(error).rstrip('.') or type(error).__name__})"


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert to mode RGB, 8 bits a channel."""
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow clips these at 255 instead of scaling them.
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray(np.round(grey).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def central_square(image: Image.Image, shorter: int, size: int) -> NDArray[np.uint8]:
    """Resize the shorter side with antialiasing, then cut out the central square, as torchvision does.

    Args:
        shorter: shorter side after resizing, in pixels, at least ``size``.
        size: side of the square.

    Returns:
        uint8 (3, size, size).
    """
    height, width = resized_shape(image.height, image.width, shorter)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return channels_first(image.crop((left, top, left + size, top + size)))


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width after the shorter side is resized to ``shorter``, in pixels, rounded as torchvision does."""
    short = min(height, width)
    scaled = [shorter if side == short else int(shorter * side / short) for side in (height, width)]
    return scaled[0], scaled[1]


def box_of(image: Image.Image, box: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Cut out a box (top, left, height, width) and resize it with antialiasing: uint8 (3, size, size)."""
    top, left, height, width = (int(number) for number in box)
    part = image.crop((left, top, left + width, top + height))
    return channels_first(part.resize((size, size), Image.Resampling.BILINEAR))


def channels_first(image: Image.Image) -> NDArray[np.uint8]:
    """An RGB image as an array: uint8 (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1)


def decode_square(path: str, size: int) -> NDArray[np.uint8]:
    """The central square of a file with its shorter side resized to ``size``: uint8 (3, size, size)."""
    return np.ascontiguousarray(central_square(read_image(path), size, size))
