"""Re-read a prepared folder: every image must still have the bytes that its index says, every .beton file its own."""

from __future__ import annotations

from pathlib import Path

from data_prep.checks import hash_file, name_some
from distill.data.catalogue import PreparedSet
from distill.data.index import fingerprint
from distill.data.workers import processors, spread
from distill.errors import DataError
from distill.progress import Progress


def verify(folder: Path) -> int:
    """Compare size and SHA-256 of every image with the index, and those of .beton files with their manifest.

    Returns:
        The number of images.

    Raises:
        DataError: naming up to five images that are missing or changed, or a .beton file that is; or when index and
            manifest disagree.
    """
    prepared = PreparedSet.open(folder)
    indices = {split: prepared.index(split) for split in prepared.splits}
    if fingerprint([entry.folder for entry in prepared.classes], indices) != prepared.fingerprint:
        raise DataError(f"The index of {folder} does not match its manifest; remove the folder and prepare it again.")
    total, faults = sum(map(len, indices.values())), []
    with Progress(total, "verify", "image") as progress:
        for index in indices.values():
            paths = [str(index.path(prepared.root, position)) for position in range(len(index))]
            for position, found in enumerate(spread(hash_file, paths, processors())):
                if found.fault:
                    faults.append(f"{paths[position]} {found.fault}")
                elif found.size != index.sizes[position] or found.checksum != index.checksums[position].tobytes():
                    faults.append(f"{paths[position]} has changed")
                progress.update()
    if faults:
        raise DataError(
            f"{len(faults)} of {total} images are not what they were: {name_some(faults)}; "
            f"restore them, or remove {folder} and prepare it again."
        )
    if any(folder.glob("ffcv-*/manifest.json")):
        from data_prep.formats import ffcv

        ffcv.check(folder)
    return total
