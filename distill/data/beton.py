"""Which .beton files belong to a prepared data set, and whether they are whole. FFCV itself is not needed here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config import DatasetConfig, FormatConfig
from distill.data.catalogue import PreparedSet
from distill.errors import ConfigError, DataError, GuardError
from distill.files import read_json

FORMAT, VERSION = "guard-beton", 1
RAW_UP_TO = 256
"""Largest side, in pixels, that mode=auto keeps as pixels."""
STORED_PER_SEEN = 400 / 224
"""Default side of a record relative to the images that networks see: ffcv-imagenet's ResNet-18 at 224 pixels."""


@dataclass(frozen=True)
class BetonLayout:
    """How the records of a .beton file are written.

    Attributes:
        mode: "raw", "jpg" or "proportion".
        jpeg_share: share of JPEG records, 0 for raw and 1 for jpg.
        quality: of JPEG records; 0 where there are none.
        side: "longest" or "shortest" side is at most ``resolution``; "square": the shorter side is resized to
            ``resolution`` and the central square cut out.
        resolution: in pixels; smaller images stay as they are, except for squares.
    """

    mode: str
    jpeg_share: float
    quality: int
    side: str
    resolution: int

    @classmethod
    def of(cls, form: FormatConfig, dataset: DatasetConfig) -> BetonLayout:
        """The layout that options ask for.

        Raises:
            ConfigError: when they are not those of format=ffcv, or one of them would do nothing.
        """
        if form.name != "ffcv" or form.mode is None:
            raise ConfigError(f"format={form.name} has no .beton files; choose format=ffcv.")
        if dataset.stored_size:
            _refuse(form, ("side", "resolution"), f"with dataset.stored_size={dataset.stored_size}")
            side, resolution = "square", dataset.stored_size
        else:
            side = form.side or "longest"
            resolution = form.resolution or round(dataset.image_size * STORED_PER_SEEN)
        mode = form.mode
        if mode == "auto":
            mode = "raw" if resolution <= RAW_UP_TO else "proportion"
        if mode != "proportion":
            _refuse(form, ("jpeg_share",), f"with format.mode={mode}")
        if mode == "raw":
            _refuse(form, ("quality",), "with format.mode=raw")
        share = {"raw": 0.0, "jpg": 1.0}.get(mode, 0.1 if form.jpeg_share is None else form.jpeg_share)
        return cls(mode, share, (form.quality or 90) if share else 0, side, resolution)

    @property
    def name(self) -> str:
        """The name of its folder: ffcv-proportion0.1-longest400-q90."""
        share = f"{self.jpeg_share:g}" if self.mode == "proportion" else ""
        quality = f"-q{self.quality}" if self.quality else ""
        return f"ffcv-{self.mode}{share}-{self.side}{self.resolution}{quality}"

    def folder(self, prepared: PreparedSet) -> Path:
        """Where the files lie, inside the folder of the prepared data set."""
        return prepared.folder / self.name


def _refuse(form: FormatConfig, names: tuple[str, ...], circumstance: str) -> None:
    for name in names:
        if getattr(form, name) is not None:
            raise ConfigError(f"format.{name}={getattr(form, name)} does nothing {circumstance}; leave it out.")


def beton_file(prepared: PreparedSet, layout: BetonLayout, split: str) -> tuple[Path, dict[str, Any]]:
    """The .beton file of a stored split and its entry in the manifest.

    An entry holds ``file``, ``records``, ``bytes``, where the images begin and end in the file (``data_start``,
    ``data_end``), and the SHA-256 of the images (``data_sha256``) and of everything else (``index_sha256``), which is
    checked here.

    Args:
        split: "train" or "test".

    Raises:
        DataError: when it is missing, truncated, or was written from other images.
    """
    folder = layout.folder(prepared)
    again = f"remove {folder} and run guard prepare with the same options and format=ffcv again"
    manifest = read_beton_manifest(folder)
    if manifest["fingerprint"] != prepared.fingerprint or manifest["layout"] != asdict(layout):
        raise DataError(f"{folder} was written from other images than {prepared.folder} holds; {again}.")
    if split not in manifest["files"]:
        raise DataError(f"{folder} holds no {split} split; run guard prepare with format=ffcv to finish it.")
    entry: dict[str, Any] = manifest["files"][split]
    path = folder / entry["file"]
    if not path.is_file():
        raise DataError(f"{path} does not exist; {again}.")
    if path.stat().st_size != entry["bytes"]:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes and was written with {entry['bytes']}: it is truncated or "
            f"another file; {again}."
        )
    if index_digest(path, entry) != entry["index_sha256"]:
        raise DataError(f"The index of {path} is damaged; {again}.")
    return path, entry


def index_digest(path: Path, entry: Mapping[str, Any]) -> str:
    """SHA-256 of all of a .beton file but its images: header, labels, places and sizes of the records."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        hasher.update(file.read(entry["data_start"]))
        file.seek(entry["data_end"])
        hasher.update(file.read())
    return hasher.hexdigest()


def read_beton_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of .beton files. Raises DataError when it has none, or a damaged one."""
    file = folder / "manifest.json"
    if not file.is_file():
        raise DataError(f"{folder} holds no .beton files; run guard prepare with the same options and format=ffcv.")
    try:
        manifest: dict[str, Any] = read_json(file)
        form = (manifest["format"], manifest["version"])
        missing = {"fingerprint", "layout", "files"} - set(manifest)
    except (GuardError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged; remove {folder} and run guard prepare with format=ffcv again.") from error
    if form != (FORMAT, VERSION) or missing:
        raise DataError(f"{file} is not of format {FORMAT} version {VERSION}; remove {folder} and prepare it again.")
    return manifest
