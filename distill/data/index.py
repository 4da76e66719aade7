"""The index of one split: which image files, in which order, with which labels, sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import DataError, GuardError
from distill.files import file_digest, load_tensors, save_tensors


@dataclass(frozen=True, eq=False)
class Index:
    """Arrays rather than objects: the 1.28 million images of ImageNet-1K take 0.1 GB and load in a moment.

    Attributes:
        names: bytes (N,), paths relative to the root of the images.
        labels: int64 (N,).
        sizes: int64 (N,), bytes of each file.
        checksums: uint8 (N, 32), SHA-256 of each file.
        shapes: int64 (N, 2), height and width of each image in pixels.
        plain: bool (N,), whether a file is a JPEG with red, green and blue or one grey channel, which every decoder
            reads alike; the others (PNG, CMYK, 16 bit …) are left to Pillow.
    """

    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint8]
    shapes: NDArray[np.int64]
    plain: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: NDArray[np.int64]) -> Index:
        """The index of some of the files, in the given order."""
        return Index(**{column.name: getattr(self, column.name)[positions] for column in fields(self)})

    def path(self, root: Path, position: int) -> Path:
        """Where one file lies."""
        return root / os.fsdecode(bytes(self.names[position]))

    def update(self, hasher: Any) -> None:
        """Feed labels and image bytes, in order, to a hash; paths stay out."""
        hasher.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        hasher.update(np.ascontiguousarray(self.checksums).tobytes())

    def save(self, path: Path) -> dict[str, Any]:
        """Write the index atomically; returns its entry in the manifest."""
        import torch

        width = self.names.dtype.itemsize
        columns = {
            "names": np.ascontiguousarray(self.names).view(np.uint8).reshape(len(self), width),
            "labels": self.labels,
            "sizes": self.sizes,
            "checksums": self.checksums,
            "shapes": self.shapes,
            "plain": self.plain,
        }
        save_tensors(path, {name: torch.from_numpy(column) for name, column in columns.items()})
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any]) -> Index:
        """Read an index that its entry in the manifest describes.

        Raises:
            DataError: when the file is missing or is not the one that was written.
        """
        path = folder / entry["file"]
        try:
            if file_digest(path) != entry["sha256"]:
                raise DataError("its checksum is wrong")
            columns = {name: column.numpy() for name, column in load_tensors(path).items()}
        except (OSError, GuardError) as error:
            cause = "it does not exist" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
            raise DataError(
                f"The index {path} is damaged ({cause}); remove {folder / 'manifest.json'} and run guard prepare again."
            ) from error
        names = np.ascontiguousarray(columns["names"])
        return cls(
            names.view(f"S{names.shape[1]}").reshape(len(names)),
            columns["labels"],
            columns["sizes"],
            columns["checksums"],
            columns["shapes"],
            columns["plain"],
        )


def fingerprint(folders: Sequence[str], splits: Mapping[str, Index]) -> str:
    """SHA-256 over the class order and, split by split, the labels and image bytes; independent of all paths."""
    hasher = hashlib.sha256(json.dumps(list(folders), ensure_ascii=False).encode())
    for name in sorted(splits):
        hasher.update(f"\n{name} {len(splits[name])}\n".encode())
        splits[name].update(hasher)
    return hasher.hexdigest()
