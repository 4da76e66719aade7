"""From a source of real images to a prepared folder: fetch, check every image, freeze the class order.

A prepared folder holds ``source.json``, written first, which says what it is made from; ``images/`` unless the images
stay where they are; an index for each split; and ``manifest.json``, written last: with it the folder is complete.
Files of another format than ``format=folder`` are written from it into folders of their own inside it.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.freeze import check_count, freeze, place_of
from data_prep.layout import find_root
from distill.config import Config, DatasetConfig
from distill.data.catalogue import PreparedSet, read_manifest
from distill.data.workers import locked
from distill.errors import ConfigError, DataError
from distill.files import read_json, write_json


def prepare(config: Config) -> PreparedSet:
    """Make ``data_root/<dataset.name>``, or return it when it is there, complete and made from the same source.

    With another ``format`` than folder its files are written too, where they are not complete.

    A source that has moved is recognised by its content. Without ``dataset.source`` a prepared set is taken from
    wherever it was made. Killed at any time, the next call goes on with the images that were fetched whole.

    Raises:
        ConfigError: when the options do not fit each other or the images.
        DataError: when the source is missing, damaged or another one than the folder was made from; or when images
            are unreadable and ``dataset.on_corrupt=error``.
    """
    dataset = config.dataset
    if not dataset.name:
        raise ConfigError("dataset.name must be set; the prepared images lie in data_root/name.")
    folder = Path(config.data_root) / dataset.name
    provider = _module("provider", "folder" if dataset.source else dataset.provider)
    form = None if config.format.name == "folder" else _module("format", config.format.name)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if (folder / "manifest.json").is_file():
            prepared = _reuse(folder, dataset, provider)
        else:
            prepared = _make(folder, dataset, provider)
        if form is not None:
            form.write(config, prepared)
    return prepared


def _module(kind: str, name: str) -> Any:
    """A module of ``data_prep.providers`` or ``data_prep.formats``."""
    names = sorted(file.stem for file in (Path(__file__).parent / f"{kind}s").glob("[!_]*.py"))
    if name not in names:
        key = "dataset.provider" if kind == "provider" else "format.name"
        raise ConfigError(f"{key}={name} is not one of: {', '.join(names)}.")
    return importlib.import_module(f"data_prep.{kind}s.{name}")


def _make(folder: Path, dataset: DatasetConfig, provider: Any) -> PreparedSet:
    """Get the images and check them."""
    identity = provider.identity(dataset)
    _begin(folder, identity)
    images = folder / "images"
    root: Path = find_root(images) if images.is_dir() else provider.fetch(dataset, folder)
    freeze(folder, root, dataset, identity, _absolute(dataset.source))
    return PreparedSet.open(folder)


def _reuse(folder: Path, dataset: DatasetConfig, provider: Any) -> PreparedSet:
    """A complete folder, after a check that it is what the options ask for."""
    manifest = read_manifest(folder)
    made_from, path = manifest["source"]["identity"], manifest["source"]["path"]
    moved = bool(dataset.source) and _absolute(dataset.source) != path
    _check_identity(folder, made_from, path, moved, dataset, provider)
    check_count(len(manifest["classes"]), dataset, str(folder))
    skipped = manifest["corrupt"]["count"]
    if skipped and dataset.on_corrupt == "error":
        raise DataError(
            f"{folder} was prepared without {skipped} unreadable images, and dataset.on_corrupt is error; "
            f"pass dataset.on_corrupt=skip, or repair them, remove {folder} and prepare again."
        )
    if moved and not (folder / manifest["images"]).is_dir():
        manifest["images"] = place_of(provider.fetch(dataset, folder), folder)
        manifest["source"]["path"] = _absolute(dataset.source)
        write_json(folder / "manifest.json", manifest)
    if dataset.copy and made_from["kind"] == "folder" and Path(manifest["images"]).is_absolute():
        raise DataError(
            f"{folder} refers to the images in {manifest['images']}, and dataset.copy=true asks for a copy; "
            f"leave it out, or remove {folder} and prepare again."
        )
    return PreparedSet.open(folder)


def _check_identity(
    folder: Path, made_from: dict[str, Any], path: str, moved: bool, dataset: DatasetConfig, provider: Any
) -> None:
    imported = made_from["kind"] in ("folder", "archive")
    if dataset.source:
        if not moved and made_from["kind"] == "archive" and not os.path.exists(path):
            return  # An archive may be thrown away once it is extracted.
    elif imported or dataset.provider == "folder":
        return
    asked = provider.identity(dataset)
    if asked != made_from:
        origin = path if imported else " ".join(str(made_from[key]) for key in ("kind", "class") if key in made_from)
        wanted = dataset.source or f"dataset.provider={dataset.provider} {dataset.torchvision_class}".rstrip()
        raise DataError(
            f"{folder} was prepared from {origin}, and {wanted} holds other images; "
            f"choose another dataset.name or data_root, or remove {folder}."
        )


def _begin(folder: Path, identity: dict[str, Any]) -> None:
    """Write down what the folder is being made from; remove what was begun from something else."""
    note = folder / "source.json"
    for stale in folder.glob(".*.tmp"):
        stale.unlink()
    if note.is_file():
        if read_json(note) == identity:
            return
        for name in ("images", "images.partial", "download"):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} exists and was not made by guard prepare; choose another dataset.name or data_root.")
    write_json(note, identity)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""
