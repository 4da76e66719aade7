"""Zip and tar archives: what they are known by, and extraction that cannot leave its folder."""

from __future__ import annotations

import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from data_prep.layout import ANNOTATIONS, is_image
from data_prep.target import copy_stream
from distill.errors import DataError
from distill.progress import Progress

BLOCK, BLOCKS = 1 << 16, 64


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive or a tar archive, compressed or not."""
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def archive_signature(path: Path) -> str:
    """SHA-256 that tells archives apart without reading hundreds of gigabytes.

    Of a zip archive it covers the directory at the end, which holds name, size and CRC of every file; of any other
    the length and 64 evenly spaced blocks of 64 KiB, which is all of it up to 4 MiB.
    """
    size = path.stat().st_size
    hasher = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                starts = range(archive.start_dir, size, BLOCK)
        elif size <= BLOCK * BLOCKS:
            starts = range(0, size, BLOCK)
        else:
            starts = range(0, size - BLOCK + 1, (size - BLOCK) // (BLOCKS - 1))
        for start in starts:
            file.seek(start)
            hasher.update(file.read(BLOCK))
    return hasher.hexdigest()


def extract(path: Path, target: Path) -> None:
    """Extract the images of an archive, and Tiny ImageNet's annotations, below ``target``.

    Raises:
        DataError: when the archive is damaged, encrypted, holds links in place of images, names a file twice, or
            names one outside of the target; nothing is written outside in any case.
    """
    try:
        files = _zip_files(path) if zipfile.is_zipfile(path) else _tar_files(path)
        with Progress(0, f"extract {path.name}", "file") as progress:
            for name, stream in files:
                with stream:
                    copy_stream(stream, target / name)
                progress.total += 1
                progress.update()
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise DataError(f"The archive {path} is damaged or of an unknown kind ({error}); get it again.") from error
    except FileExistsError as error:
        raise DataError(f"The archive {path} holds {error.filename} twice; repack it.") from error
    if not progress.done:
        raise DataError(f"The archive {path} holds no images.")


def _zip_files(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.is_dir() and _wanted(entry.filename, path):
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise DataError(_LINK.format(path=path, name=entry.filename))
                yield entry.filename, cast(BinaryIO, archive.open(entry))


def _tar_files(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    with tarfile.open(path, "r:*") as archive:
        for entry in archive:
            if not entry.isdir() and _wanted(entry.name, path):
                stream = archive.extractfile(entry) if entry.isfile() else None
                if stream is None:
                    raise DataError(_LINK.format(path=path, name=entry.name))
                yield entry.name, cast(BinaryIO, stream)


_LINK = "The archive {path} holds {name} as a link or device; repack it with plain files."


def _wanted(name: str, path: Path) -> bool:
    """Whether to extract an entry; raises DataError when its name leads outside of the target."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or os.path.splitdrive(name)[0]:
        raise DataError(f"The archive {path} holds {name!r}, which leads outside of its folder; nothing of it is used.")
    return pure.parts[:1] != ("__MACOSX",) and (is_image(pure.name) or pure.name == ANNOTATIONS)
