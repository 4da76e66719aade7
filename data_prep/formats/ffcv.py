"""FFCV's .beton files: one for each split, whose record i is image i of the whole index of the split.

The folder ``NAME/ffcv-…`` holds ``train.beton``, ``val.beton`` (the test images), and ``manifest.json``, which
names those that are complete. Other processes decode and encode; this one writes what they give in the order of the
index, so that the bytes depend on nothing but images, options and the versions of Pillow and its codecs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.formats._beton_writer import BetonWriter
from data_prep.formats._plan import Plan
from distill.config import Config
from distill.data.beton import FORMAT, VERSION, BetonLayout, beton_file, index_digest, read_beton_manifest
from distill.data.catalogue import PreparedSet
from distill.data.ffcv_loader import library
from distill.errors import DataError
from distill.files import remove, write_json
from distill.progress import Progress


def write(config: Config, prepared: PreparedSet) -> Path:
    """The folder of the .beton files of a prepared data set; those that are not complete are written.

    Raises:
        ConfigError: when the images are too large for the format.
        DataError: when an image is missing or damaged, the disk is full, or the folder holds other or damaged files.
        MissingPackageError: FFCV is not installed and something has to be written.
    """
    layout = BetonLayout.of(config.format, config.dataset)
    folder = layout.folder(prepared)
    files: dict[str, Any] = {}
    if (folder / "manifest.json").is_file():
        files = {split: beton_file(prepared, layout, split)[1] for split in read_beton_manifest(folder)["files"]}
    missing = [split for split in prepared.splits if split not in files]
    if not missing:
        return folder
    library()  # Told first when it is not installed.
    plans = [Plan.of(prepared, layout, split) for split in missing]
    complete = {"format": FORMAT, "version": VERSION, "fingerprint": prepared.fingerprint, "layout": asdict(layout)}
    with _telling(folder):
        folder.mkdir(exist_ok=True)
        remove([*folder.glob(".*.tmp"), *(folder / plan.file for plan in plans)])
        _check_space(folder, plans)
        for plan in plans:
            files[plan.split] = _convert(folder / plan.file, plan)
            write_json(folder / "manifest.json", {**complete, "files": files})
    return folder


def _convert(path: Path, plan: Plan) -> dict[str, Any]:
    """Write one file under a temporary name, then rename it; returns its entry in the manifest."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file, Progress(len(plan.index), f"write {path.name}", "image") as progress:
            writer = BetonWriter(file, plan.index.labels, plan.page_size)
            with contextlib.closing(plan.records()) as records:
                for record in records:
                    writer.add(record)
                    progress.update()
            entry = {"file": path.name, **writer.finish()}
            file.flush()
            os.fsync(file.fileno())
        entry["index_sha256"] = index_digest(temporary, entry)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return entry


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Say in one sentence what went wrong on disk; leave no empty folder behind."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EAGAIN):  # No process or memory could be had: nothing of the disk.
            raise
        raise DataError(
            f"{error.filename or folder} could not be written ({error.strerror or error}); make room there, or choose "
            f"a data_root that can be written, and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_space(folder: Path, plans: list[Plan]) -> None:
    need, free = sum(plan.least for plan in plans), shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"The .beton files need at least {need / 2**30:.3g} GiB, and {free / 2**30:.3g} "
            f"GiB are free in {folder}; make room there, choose another data_root, or write smaller records "
            f"(format.resolution, format.mode=jpg)."
        )


def check(folder: Path) -> None:
    """Re-read every .beton file of a prepared folder; FFCV is not needed.

    Raises:
        DataError: naming a file that is missing, changed, or was written from other images.
    """
    prepared = PreparedSet.open(folder)
    for file in sorted(folder.glob("ffcv-*/manifest.json")):
        manifest = read_beton_manifest(file.parent)
        try:
            layout = BetonLayout(**manifest["layout"])
        except TypeError as error:
            raise DataError(f"{file} is damaged; remove {file.parent} and prepare it again.") from error
        for split in manifest["files"]:
            path, entry = beton_file(prepared, layout, split)
            if _data_digest(path, entry) != entry["data_sha256"]:
                raise DataError(
                    f"The images of {path} have changed; remove {file.parent} and run guard prepare with the same "
                    f"options and format=ffcv again."
                )


def _data_digest(path: Path, entry: dict[str, Any]) -> str:
    """SHA-256 of the pages of a .beton file."""
    start, end, block, hasher = entry["data_start"], entry["data_end"], 1 << 20, hashlib.sha256()
    with open(path, "rb") as file, Progress((end - start) // block, f"verify {path.name}", "MiB") as progress:
        file.seek(start)
        for _ in range(start, end, block):
            hasher.update(file.read(block))
            progress.update()
    return hasher.hexdigest()
