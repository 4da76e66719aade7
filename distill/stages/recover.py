"""Recover: optimise noise, or real patches, until the teacher takes it for real images (SRe²L, CDA; SPEC §2).

A unit of work is one batch of images with its own seed. Units do not depend on each other, so any number of workers
share them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.distilled_set import Unit, plan_units
from distill.files import load_tensors, save_tensors
from distill.models import Normalize, load_teacher
from distill.progress import Progress
from distill.recovery import CURVE, build_objective, recover_unit
from distill.recovery.class_statistics import shared_statistics
from distill.recovery.real_images import RealImages
from distill.recovery.start import starting_images
from distill.recovery.teachers import other_teachers
from distill.stages.ready_images import take_images
from distill.stages.work import Work
from distill.training.processes import deterministic


def run(work: Work) -> None:
    """Make ``distilled/``: a file for each unit, and the manifest."""
    config, processes = work.config, work.processes
    recover = config.recover
    if recover.images:
        take_images(work)
        return
    teacher = load_teacher(work.run / "teacher", processes.device).to(memory_format=torch.channels_last)
    normalize = Normalize(config.dataset.mean, config.dataset.std).to(processes.device)
    units = plan_units(recover.ipc, recover.images_per_class, config.dataset.num_classes, recover.classes_per_unit)
    teachers = [teacher, *other_teachers(config, processes.device)]
    real = RealImages(config, work.prepared) if recover.reads_real_images else None
    objective = build_objective(teachers, recover, max(len(unit.labels) for unit in units))

    def make(number: int, path: Path, progress: Progress) -> None:
        unit, size, start = units[number], config.dataset.image_size, None
        with deterministic(processes.device):
            if real is not None and recover.start != "noise":
                start = starting_images(unit, recover, real, teacher, normalize, config.seed)
            if real is not None and recover.statistics == "class":
                objective.aim_at(shared_statistics(work.folder, unit.classes[0], teacher, normalize, real))
            result = recover_unit(objective, normalize, unit, size, recover, config.seed, progress, start)
        save_tensors(path, vars(result))

    def finish() -> None:
        _finish(work, teacher, normalize, units)

    work.share([unit.file for unit in units], make, finish, "recover", "iteration", recover.iterations or 1)


def _finish(work: Work, teacher: nn.Module, normalize: Normalize, units: list[Unit]) -> None:
    """Gather all units, ask the teacher what it sees in the stored pixels, write the manifest."""
    config, correct, count, final = work.config, 0, 0, []
    for unit in units:
        tensors = load_tensors(work.folder / unit.file)
        with torch.no_grad():
            answers = teacher(normalize(tensors["images"].to(work.processes.device))).argmax(dim=1).cpu()
        # Before the manifest: after a kill curves may stand there twice, but of a complete set nothing is told again.
        _show(work, unit, tensors)
        correct += int((answers == tensors["labels"]).sum())
        count += len(answers)
        final.append(tensors["curve"][-1].tolist())
    mean = np.mean(final, axis=0)
    work.artifact.finish(
        units=[unit.file for unit in units],
        count=count,
        ipc=config.recover.ipc,
        image_size=config.dataset.image_size,
        mean=config.dataset.mean,
        std=config.dataset.std,
        class_names=[info.name for info in work.prepared.classes],
        final={name: float(value) for name, value in zip(CURVE, mean[1:], strict=True)},
        teacher_top1=correct / count,
    )


def _show(work: Work, unit: Unit, tensors: dict[str, Tensor]) -> None:
    """The stored curve and pictures of a unit, whichever process made it."""
    for iteration, *terms in tensors["curve"].tolist():
        values = dict(zip(CURVE, terms, strict=True))
        work.monitor.scalars(int(iteration), values, f"unit_{unit.number:05d}")
    steps = [*sorted(work.config.recover.snapshots), work.config.recover.iterations]
    if unit.number == 0:
        work.monitor.images(work.config.recover.iterations, "distilled", tensors["images"][:100])
    if len(tensors["snapshots"]):
        for step, images in zip(steps, tensors["snapshots"], strict=True):
            work.monitor.images(step, "images", images)
