"""``guard spectrum``: the curvature of the loss of a run's networks around real images, as an artifact of the run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from distill.config import Config, NetworkConfig, result_options
from distill.data.batch import Batch
from distill.data.catalogue import PreparedSet
from distill.data.loaders import samples, test_loader
from distill.errors import ArtifactError, ConfigError, DataError
from distill.files import listed, locked, write_json
from distill.limits import check
from distill.models import Normalize, load_teacher
from distill.robustness.bound import Spectrum
from distill.robustness.spectrum import check_radii, input_spectrum
from distill.run_folder import SPECTRUM, SPECTRUM_SUMMARY, Artifact, Recipe, read_manifest
from distill.stages.student import load_student
from distill.stages.work import Work
from distill.training.monitor import NullMonitor
from distill.training.processes import processes

MADE_BY = {"teacher": "squeeze", "student": "evaluate"}
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class SpectrumOptions:
    """What is measured.

    Attributes:
        images: so many real images, a seeded choice balanced over the classes; 0: all.
        top: eigenvalues of each image.
        radii: ρ of Eq. 6, L2 lengths in normalised pixels, ascending.
        precision: of the networks, a key of ``PRECISIONS``; losses and Lanczos vectors are always float64.
        split: where the images are taken from, one of ``SPLITS``.

    Raises:
        ConfigError: a value is out of range.
    """

    images: int
    top: int
    radii: tuple[float, ...]
    precision: str
    split: str

    def __post_init__(self) -> None:
        for name, least in (("images", 0), ("top", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least {least}.")
        for name, choices in (("precision", tuple(PRECISIONS)), ("split", SPLITS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"--{name} {getattr(self, name)} is not one of: {', '.join(choices)}.")
        if not self.radii:
            raise ConfigError("--radii needs at least one radius.")
        check_radii(self.radii)


def parse_radii(text: str) -> tuple[float, ...]:
    """``0.05,0.1`` → (0.05, 0.1). Raises ConfigError when they are no numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--radii {text} must be numbers with commas between them, such as 0.05,0.1.") from error


def measure(run: Path, options: SpectrumOptions, *, device: str = "auto", data_root: Path | None = None) -> None:
    """Make ``spectrum/`` of a run: one file for its teacher and one for each of its students, then the summary.

    A network whose file is there is not measured again: after a kill the same call goes on with the next one.

    Args:
        run: a run folder with a complete teacher and complete students.
        device: auto, cpu or cuda.
        data_root: folder of the prepared data sets; None takes that of the run's configuration.

    Raises:
        ArtifactError: the run lacks something, or its spectrum was made with other options.
        ConfigError, DataError: options or data set do not fit.
    """
    config = read_config(run)
    for name, command in MADE_BY.items():
        if "manifest.json" not in listed(run / name):
            raise ArtifactError(f"{run} has no complete {name}; guard {command} makes it.")
    values = 3 * config.dataset.image_size**2
    if options.top > values:
        raise ConfigError(f"--top {options.top} must be at most {values}, the values of an image of {run}.")
    students = read_manifest(run / "student", "student")
    config.student = NetworkConfig(**students["network"])
    data = (data_root or Path(config.data_root)) / config.dataset.name
    if not data.is_dir():
        raise DataError(f"{data} holds no prepared data set, which {run} needs; --data-root says where it lies now.")
    prepared = PreparedSet.open(data)
    artifact = _artifact(run, config, options, prepared)
    if artifact.complete:
        return
    with processes(device) as group, locked(run):
        artifact.begin()
        work = Work(config, run, artifact, prepared, group, NullMonitor())
        images = _images(work, options)
        names = ["teacher", *(f"seed{seed}" for seed in students["seeds"])]
        for name in names:
            path = artifact.folder / f"{name}.safetensors"
            if not path.is_file():
                _measure(work, name, images, options).write(path)
        spectra = {name: Spectrum.read(artifact.folder / f"{name}.safetensors") for name in names}
        write_json(artifact.folder / SPECTRUM_SUMMARY, _summary(config, options, spectra))
        artifact.finish(networks=names)


def read_config(run: Path) -> Config:
    """The configuration that a run was made with, from its ``config.yaml``.

    Raises:
        ArtifactError: there is none, or it is not of this version.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ArtifactError(f"{run} has no config.yaml; the command that made the run writes it again.")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
        assert isinstance(config, Config)
        check(config)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, ConfigError) as error:
        cause = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise ArtifactError(
            f"{path} is no configuration of this version ({cause}); the command that made the run writes it again."
        ) from error
    return config


class _SpectrumArtifact(Artifact):
    """As every artifact, but made with options of the command line."""

    def _check_recipe(self, stored: Mapping[str, Any]) -> None:
        texts = self.recipe.differences(stored)
        if texts:
            raise ArtifactError(
                f"{self.folder} was made otherwise; these differ: {'; '.join(texts)}. Give the same options, or remove "
                f"that folder."
            )


def _artifact(run: Path, config: Config, options: SpectrumOptions, prepared: PreparedSet) -> Artifact:
    chosen = {
        "--images": options.images,
        "--top": options.top,
        "--radii": list(options.radii),
        "--precision": options.precision,
        "--split": options.split,
    }
    inputs = {name: str(read_manifest(run / name, name)["fingerprint"]) for name in MADE_BY}
    recipe = Recipe(chosen | result_options(config, "seed", "dataset"), {"dataset": prepared.fingerprint, **inputs})
    return _SpectrumArtifact(run / SPECTRUM, SPECTRUM, recipe)


def _images(work: Work, options: SpectrumOptions) -> Batch:
    """The real images as the tests of evaluate see them, on the CPU; indices are positions in the stored split."""
    config = work.config
    rows = torch.from_numpy(samples(config, work.prepared, options.split).choose(options.images, config.seed).rows)
    loader = test_loader(
        config,
        work.prepared,
        split=options.split,
        max_images=options.images,
        batch_size=config.evaluate.test_batch_size,
    )
    images, labels, indices = zip(*((b.images, b.labels, b.indices) for b in loader), strict=True)
    return Batch(torch.cat(images), torch.cat(labels), rows[torch.cat(indices)])


def _measure(work: Work, name: str, images: Batch, options: SpectrumOptions) -> Spectrum:
    dtype, dataset = PRECISIONS[options.precision], work.config.dataset
    network: nn.Module
    if name == "teacher":
        network = load_teacher(work.run / "teacher", work.processes.device)
    else:
        network = load_student(work, int(name.removeprefix("seed")))
    # Convolutions on channels-last memory are faster, on CPUs too.
    network = copy.deepcopy(network).to(dtype).to(memory_format=torch.channels_last)
    normalized = Normalize(dataset.mean, dataset.std)(images.images).to(dtype)
    return input_spectrum(
        network,
        normalized,
        images.labels,
        options.top,
        options.radii,
        indices=images.indices,
        seed=work.config.seed,
        description=f"{work.config.name} {name}",
        quiet=not work.processes.main,
    )


def _summary(config: Config, options: SpectrumOptions, spectra: Mapping[str, Spectrum]) -> dict[str, Any]:
    return {
        "name": config.name,
        "seed": config.seed,
        "dataset": config.dataset.name,
        "split": options.split,
        "precision": options.precision,
        "networks": {name: spectrum.summary() for name, spectrum in spectra.items()},
    }
