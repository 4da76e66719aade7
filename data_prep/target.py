"""Writing the images of a prepared folder: under a temporary name, renamed when whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from distill.errors import DataError


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes ``folder/images`` when the block ends without an error.

    Raises:
        DataError: when the disk is full or the folder cannot be written.
    """
    partial = folder / "images.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder / "images")
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        raise DataError(
            f"The images could not be written to {folder} ({error.strerror or error}{place}); "
            f"make room there or choose another data_root, and run the same command again."
        ) from error


def copy_stream(source: BinaryIO, target: Path) -> None:
    """Write one new file below a folder of ``filling``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
