"""Look at image files: their bytes, and whether they can be fully decoded to RGB."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from distill.data.decode import fault, to_rgb


@dataclass(frozen=True, slots=True)
class Finding:
    """One file: its size in bytes, its SHA-256, and what is wrong with it ("" when nothing).

    After decoding also height and width in pixels, and whether it is a plain JPEG (see ``Index``).
    """

    size: int
    checksum: bytes
    fault: str
    shape: tuple[int, int] = (0, 0)
    plain: bool = False


def hash_file(path: str, decode: bool = False) -> Finding:
    """Read a file and hash it; with ``decode``, see whether it is a whole image."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return Finding(0, bytes(32), fault(error))
    finding = Finding(len(content), hashlib.sha256(content).digest(), "")
    if decode:
        try:
            with Image.open(io.BytesIO(content)) as image:
                plain = image.format == "JPEG" and image.mode in ("RGB", "L")
                width, height = to_rgb(image).size
                return replace(finding, shape=(height, width), plain=plain)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds.
            return replace(finding, fault=fault(error))
    return finding


def inspect_image(path: str) -> Finding:
    """Read, hash and fully decode an image file."""
    return hash_file(path, decode=True)


def name_some(faults: list[str], most: int = 5) -> str:
    """The first few of a list of faults, and how many more there are."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
