"""The stages of a run in order: what each is made from, what it makes, and which options change that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from distill.config import Config, EvaluateConfig, RelabelConfig, result_options
from distill.data.catalogue import PreparedSet
from distill.errors import ArtifactError
from distill.run_folder import RESULTS, Artifact, Recipe

TESTING = ("split", "max_images", "teacher")
"""Options of ``evaluate`` that change how networks are tested and not how students are trained."""
TRAINING = tuple(f"evaluate.{field.name}" for field in fields(EvaluateConfig) if field.name not in TESTING)
VIEWS = tuple(f"relabel.{field.name}" for field in fields(RelabelConfig) if field.name != "batch_size")
"""Options of ``relabel`` that reach a student without stored labels: a teacher is asked in the student's batches."""
DATASET = "dataset"
READING = ("images_mean", "images_std", "images_set")
"""Options that say how ``recover.images`` are read; without it they mean nothing, and no recipe holds them."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        command: which ``guard`` command runs it.
        makes: the artifact, which is also the name of its folder.
        module: what runs it, a module of ``distill.stages``.
        options: sections and keys that change its result.
        inputs: the artifacts that it is made from.
        shared: whether any number of processes may work on it at the same time; else a run has one, with its ranks.
    """

    command: str
    makes: str
    module: str
    options: Callable[[Config], tuple[str, ...]]
    inputs: Callable[[Config], tuple[str, ...]]
    shared: Callable[[Config], bool] = lambda config: False


def stored_layout(config: Config) -> dict[str, str]:
    """How the images are stored that the loader reads, as far as it changes them."""
    if config.loader.name != "ffcv":
        return {}
    from distill.data.beton import BetonLayout

    return {"format": BetonLayout.of(config.format, config.dataset).name}


def _recover_options(config: Config) -> tuple[str, ...]:
    """With ready images nothing is recovered: what counts is the images and how they are read (``artifact_of``)."""
    if config.recover.images:
        return ("dataset.num_classes", "dataset.image_size", "dataset.mean", "dataset.std")
    return ("seed", "recover", *(("dataset",) if config.recover.reads_real_images else ()))


def _recover_inputs(config: Config) -> tuple[str, ...]:
    if config.recover.images:
        return (DATASET,)
    return (DATASET, "teacher") if config.recover.reads_real_images else ("teacher",)


def _student_options(config: Config) -> tuple[str, ...]:
    return ("seed", "student", *TRAINING, *(() if stores_labels(config) else VIEWS))


def _student_inputs(config: Config) -> tuple[str, ...]:
    if config.evaluate.labels == "hard":
        return ("distilled",)
    return ("distilled", "labels" if stores_labels(config) else "teacher")


def beside(stage: Stage, folder: Path) -> list[Path]:
    """Files of a run, outside the artifact of a stage, that must be there too for it to be complete."""
    return [folder / RESULTS] if stage.makes == "outcomes" else []


def stores_labels(config: Config) -> bool:
    return config.relabel.mode == "stored" and config.evaluate.labels == "soft"


STAGES = (
    Stage(
        "squeeze",
        "teacher",
        "squeeze",
        lambda config: ("seed", "dataset", "teacher", "squeeze", "regularizer", "loader"),
        lambda config: (DATASET,),
    ),
    Stage(
        "recover",
        "distilled",
        "recover",
        _recover_options,
        _recover_inputs,
        shared=lambda config: not config.recover.images,
    ),
    Stage(
        "relabel",
        "labels",
        "relabel",
        lambda config: ("seed", "relabel"),
        lambda config: ("teacher", "distilled"),
        shared=lambda config: True,
    ),
    Stage("evaluate", "student", "student", _student_options, _student_inputs, shared=lambda config: True),
    Stage(
        "evaluate",
        "outcomes",
        "evaluate",
        lambda config: ("seed", "attacks", *(f"evaluate.{name}" for name in TESTING)),
        lambda config: (DATASET, "teacher", "distilled", "student"),
        shared=lambda config: True,
    ),
)


def artifact_of(stage: Stage, config: Config, folder: Path, prepared: PreparedSet) -> Artifact:
    from distill.exchange import images_fingerprint
    from distill.models.weights import weights_fingerprint

    fingerprints = {}
    for name in stage.inputs(config):
        if name == DATASET:
            fingerprints[name] = prepared.fingerprint
            continue
        # An input must be whole and made from the present options too: stages read more of them than their own.
        source = next(other for other in STAGES if other.makes == name)
        artifact = artifact_of(source, config, folder, prepared)
        if not artifact.complete:
            raise ArtifactError(
                f"{stage.command} needs {folder / name}, which is not complete; "
                f"run guard {source.command} with the same options."
            )
        fingerprints[name] = artifact.fingerprint
    if stage.makes == "teacher" and config.squeeze.weights:
        fingerprints["weights"] = weights_fingerprint(config.squeeze.weights)
    options = result_options(config, *stage.options(config))
    if stage.makes == "distilled" and config.recover.images:
        fingerprints["images"] = images_fingerprint(config.recover.images)
        options |= {f"recover.{name}": getattr(config.recover, name) for name in READING}
    elif stage.makes == "distilled":
        fingerprints |= other_teachers(config, prepared)
    if stage.makes == "teacher":
        options |= stored_layout(config)
    recipe = Recipe(options, fingerprints)
    return Artifact(folder / stage.makes, stage.makes, recipe)


def other_teachers(config: Config, prepared: PreparedSet) -> dict[str, str]:
    if not config.recover.teachers:
        return {}
    from distill.recovery.teachers import teachers_fingerprints

    return teachers_fingerprints(config, prepared)
