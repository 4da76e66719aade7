"""Recover without recovering: ready images of another program become the distilled set (``recover.images``)."""

from __future__ import annotations

from distill.exchange import read_images
from distill.files import save_tensors
from distill.say import say
from distill.stages.work import Work

FILE = "unit_00000.safetensors"
"""All images; named as a unit of recovery, so that whoever reads a distilled set need not know the difference."""


def take_images(work: Work) -> None:
    """Make ``distilled/`` of ``recover.images``, on rank 0; no teacher is needed.

    Raises:
        ConfigError, DataError: see ``read_images``.
    """
    if work.processes.main:
        _take(work)
    work.processes.barrier()


def _take(work: Work) -> None:
    config, classes = work.config, work.prepared.classes
    ready = read_images(config.recover, config.dataset, classes)
    for note in ready.notes:
        say(f"guard: {note}")
    save_tensors(work.folder / FILE, {"images": ready.images, "labels": ready.labels})
    work.monitor.images(0, "distilled", ready.images[:100])
    work.artifact.finish(
        units=[FILE],
        count=len(ready.images),
        ipc=int(ready.labels.bincount().max()),
        image_size=config.dataset.image_size,
        mean=config.dataset.mean,
        std=config.dataset.std,
        class_names=[info.name for info in classes],
        source={**ready.facts, "sha256": work.artifact.recipe.inputs["images"]},
    )
