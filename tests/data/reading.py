"""Loaders for the tests: every kind, over the same few real images."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep import prepare
from distill.compose import compose
from distill.config import Config
from distill.data.augment import Augment
from distill.data.batch import Batch
from distill.data.catalogue import PreparedSet
from distill.data.loaders import build_loader
from distill.data.ordered_loader import Reading
from distill.data.resolution import Resolution

EXITING = 0x4
KINDS = {
    "memory": ["loader=folder", "loader.workers=0", "dataset.stored_size=48"],
    "files": ["loader=folder", "loader.workers=0"],
    "files with workers": ["loader=folder"],
    "ffcv raw": ["loader=ffcv", "format.mode=raw"],
    "ffcv jpg": ["loader=ffcv", "format.mode=jpg", "loader.workers=3"],
    "ffcv squares": ["loader=ffcv", "dataset.stored_size=48", "loader.workers=0"],
    "ffcv quasi-random": ["loader=ffcv", "format.mode=proportion", "loader.order=quasi_random", "loader.cache=process"],
    "dali": ["loader=dali"],
    "dali squares": ["loader=dali", "dataset.stored_size=48", "loader.workers=0"],
}
"""What to compose for each kind of loader of photographs at 48 pixels."""
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia"}


def skip_without(kind: str) -> None:
    """Skip a test whose loader needs a package that is not installed."""
    package = PACKAGES.get(kind.split()[0])
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def configure(prepared: PreparedSet, kind: str, *overrides: str) -> Config:
    """The configuration of a kind of loader on a prepared data set, whose .beton files are made if need be."""
    skip_without(kind)
    places = [f"dataset.name={prepared.folder.name}", f"data_root={prepared.folder.parent}"]
    size = ["dataset.image_size=48", f"dataset.num_classes={len(prepared.classes)}"]
    config = compose(["dataset=imagenette", *places, *size, *KINDS[kind], *overrides])
    config.dataset.provider = "folder"
    prepare(config)
    return config


def make_loader(config: Config, prepared: PreparedSet, split: str = "train", size: int = 48, **options: Any) -> Any:
    """A loader of batches of 6 with random resized crops; ``options`` are those of ``Reading``, and samples=…."""
    samples = options.pop("samples", None) or prepared.samples(split)
    return build_loader(config, prepared, samples, reading(size, **({"batch_size": 6} | options)))


def reading(size: int = 48, **options: Any) -> Reading:
    """A ``Reading`` for training at one size."""
    settings = {"batch_size": 6, "resolution": Resolution(size, size), "augment": Augment()}
    return Reading(**(settings | options))


def equal(a: Batch, b: Batch) -> bool:
    """Whether two batches are the same in every column."""
    columns = ((a.images, b.images), (a.labels, b.labels), (a.indices, b.indices))
    numbers = ((each.epoch, each.weight, each.step, each.first) for each in (a, b))
    return len(set(numbers)) == 1 and all(torch.equal(x, y) for x, y in columns)


def same(batches: Iterable[Batch], others: Iterable[Batch]) -> bool:
    """Whether both give the same batches, and any at all."""
    batches, others = list(batches), list(others)
    return len(batches) == len(others) > 0 and all(map(equal, batches, others))


def threads() -> list[str]:
    """The names of this process's threads without those that have ended, which /proc lists for a moment more."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            # Flags of the kernel; one that is waited for is seen to have ended only after it has this one.
            if not int(rest.split()[6]) & EXITING:
                found.append(name)
    return found
