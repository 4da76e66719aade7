# ruff: noqa: PT028  # test_loader is no test.
"""The loaders of a run, from its configuration. Each kind is a module ``distill/data/<loader.name>_loader.py``."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import torch

from distill.config import Config
from distill.data.augment import Augment
from distill.data.batch import Batch, Loader
from distill.data.catalogue import PreparedSet
from distill.data.ordered_loader import Reading
from distill.data.resolution import Resolution, training_resolution
from distill.data.samples import Samples
from distill.errors import ConfigError, MissingPackageError


def training_loader(
    config: Config, prepared: PreparedSet, *, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
) -> Loader[Batch]:
    """Batches of ``squeeze.batch_size`` augmented training images over all ranks.

    Raises:
        ConfigError: when the batch cannot be shared equally, or the options do not fit the data set.
    """
    squeeze = config.squeeze
    reading = Reading(
        batch_size=squeeze.batch_size,
        resolution=training_resolution(config),
        augment=Augment(squeeze.crop, (squeeze.crop_scale[0], squeeze.crop_scale[1]), squeeze.padding, squeeze.flip),
        drop_last=config.loader.drop_last,
        rank=rank,
        world_size=world_size,
        device=device,
    )
    return build_loader(config, prepared, samples(config, prepared, "train"), reading)


def test_loader(
    config: Config,
    prepared: PreparedSet,
    *,
    split: str,
    max_images: int = 0,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Loader[Batch]:
    """Real images as they are tested, each exactly once over all ranks.

    Args:
        split: "test", "validation", or "train" for training images without augmentation.
        max_images: a seeded choice, balanced over the classes; 0: all.
        batch_size: images of a global batch, over all ranks.

    Raises:
        DataError: when the data set has no such split.
    """
    chosen = samples(config, prepared, split).choose(max_images, config.seed)
    size = config.dataset.image_size
    reading = Reading(batch_size, Resolution(size, size), rank=rank, world_size=world_size, device=device)
    return build_loader(config, prepared, chosen, reading)


def read_images(config: Config, prepared: PreparedSet, chosen: Samples, batch_size: int) -> Batch:
    """Those real images as they are tested, as one batch in memory; their ``indices`` are rows of the stored split."""
    size = config.dataset.image_size
    loader = build_loader(config, prepared, chosen, Reading(batch_size, Resolution(size, size)))
    batches = [batch.to("cpu") for batch in loader]
    images, labels, indices = (
        torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "indices")
    )
    return Batch(images, labels, torch.from_numpy(chosen.rows)[indices])


test_loader.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


def samples(config: Config, prepared: PreparedSet, split: str) -> Samples:
    """The samples of a split as the dataset options choose them."""
    dataset = config.dataset
    if len(prepared.classes) != dataset.num_classes:
        raise ConfigError(
            f"dataset.num_classes={dataset.num_classes}, but {prepared.folder} holds {len(prepared.classes)} classes."
        )
    return prepared.samples(
        split,
        max_per_class=dataset.max_per_class,
        validation_per_class=dataset.validation_per_class,
        seed=dataset.validation_seed,
    )


def build_loader(config: Config, prepared: PreparedSet, chosen: Samples, reading: Reading) -> Loader[Batch]:
    """The loader that ``loader`` names, for some samples. The configuration adds seed, workers and stored size."""
    reading = replace(reading, stored_size=config.dataset.stored_size, seed=config.seed, workers=config.loader.workers)
    loader: Loader[Batch] = _module(config).build(config, prepared, chosen, reading)
    return loader


def check_installed(config: Config) -> None:
    """Raise MissingPackageError when the loader needs a package that is not installed; imports none."""
    module = _module(config)
    package = getattr(module, "PACKAGE", "")
    try:
        found = not package or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise MissingPackageError(f"loader={config.loader.name} needs {package}; install it with: {module.INSTALL}.")


def _module(config: Config) -> Any:
    name = f"distill.data.{config.loader.name}_loader"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"loader.name={config.loader.name}: there is no distill/data/{config.loader.name}_loader.py."
        ) from error
