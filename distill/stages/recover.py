"""Recover: optimise noise until the teacher takes it for real images (SRe²L, CDA; SPEC §2).

A unit of work is one batch of images with its own seed. Units do not depend on each other, so ranks share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.config import RecoverConfig
from distill.data.crops import UNIFORMS, flips, resized_boxes
from distill.data.distilled_set import Unit, plan_units
from distill.errors import NonFiniteError
from distill.files import load_tensors, save_tensors
from distill.losses import batchnorm_matching
from distill.models import Normalize, load_teacher
from distill.progress import Progress
from distill.randomness import generator, seed_for
from distill.stages.work import Work
from distill.training.processes import deterministic

CURVE = ("loss", "cross_entropy", "batchnorm_matching")
SNAPSHOT_IMAGES = 20


@dataclass(frozen=True)
class Recovered:
    """A finished unit.

    Attributes:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        curve: float32 (points, 4): iteration and the terms of ``CURVE``.
        snapshots: uint8 (snapshots, n, 3, H, W) of the first images.
    """

    images: Tensor
    labels: Tensor
    curve: Tensor
    snapshots: Tensor


def smallest_crop(config: RecoverConfig, iteration: int) -> float:
    """The smallest area of a crop at an iteration, relative to the image: CDA's curriculum (SPEC §2).

    cosine: floor + (1 − floor)(1 + cos(πt/T))/2; linear: 1 − (1 − floor)t/T; step: 1 — for t < T, the floor after it,
    where T = milestone · iterations.
    """
    floor, end = config.crop_scale[0], config.milestone * config.iterations
    if config.curriculum == "none" or iteration >= end:
        return floor
    falling = {"cosine": (1 + math.cos(math.pi * iteration / end)) / 2, "linear": 1 - iteration / end, "step": 1.0}
    return floor + (1 - floor) * falling[config.curriculum]


def augment(images: Tensor, config: RecoverConfig, iteration: int, uniform: NDArray[np.float64]) -> Tensor:
    """What the teacher sees in one iteration: one random resized crop, flip and roll for the whole batch.

    Args:
        images: (N, 3, S, S).
        uniform: (UNIFORMS + 2,) numbers in [0, 1).

    Returns:
        (N, 3, S, S), differentiable in the images.
    """
    size, crop = images.shape[-1], uniform[None, :UNIFORMS]
    if config.crop:
        scale = (smallest_crop(config, iteration), max(config.crop_scale[1], smallest_crop(config, iteration)))
        top, left, height, width = resized_boxes(crop, size, size, scale)[0].tolist()
        images = images[:, :, top : top + height, left : left + width]
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    if config.flip and flips(crop)[0]:
        images = images.flip(-1)
    if config.jitter:
        down, right = (int(u * (config.jitter + 1)) for u in uniform[UNIFORMS:])
        images = images.roll((down, right), dims=(2, 3))
    return images


def recover_unit(
    teacher: nn.Module,
    normalize: Normalize,
    unit: Unit,
    size: int,
    config: RecoverConfig,
    seed: int,
    progress: Progress,
) -> Recovered:
    """Recover one unit; its result is a function of the teacher, the configuration, the seed and its number.

    Args:
        teacher: frozen, in eval mode; its device is used.
        size: height and width of the images in pixels.

    Raises:
        NonFiniteError: naming unit, iteration and term.
    """
    device = next(teacher.parameters()).device
    labels = unit.labels.to(device)
    noise = torch.Generator().manual_seed(seed_for(seed, "recover:noise", unit.number))
    images = torch.randn(len(labels), 3, size, size, generator=noise).to(device, memory_format=torch.channels_last)
    images.requires_grad_()
    optimizer = torch.optim.Adam([images], lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=1e-8)
    random = generator(seed, "recover:view", unit.number)
    curve, snapshots = [], []

    def pixels(count: int | None = None) -> Tensor:
        shown = normalize.pixels(images.detach()[:count])
        return (shown * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()

    with batchnorm_matching(teacher, config.first_bn_multiplier) as matching:
        for iteration in range(config.iterations):
            if unit.number == 0 and iteration in config.snapshots:
                snapshots.append(pixels(SNAPSHOT_IMAGES))
            optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * iteration / config.iterations)) / 2
            view = augment(images, config, iteration, random.random(UNIFORMS + 2))
            cross_entropy = F.cross_entropy(teacher(view), labels)
            distance = matching.pop()
            loss = cross_entropy + config.bn_weight * distance
            (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
            normalize.clamp_(images.data)
            if iteration % config.curve_every == 0 or iteration == config.iterations - 1:
                point = [iteration, *torch.stack([loss, cross_entropy, distance]).tolist()]
                _check_finite(unit, point)
                curve.append(point)
                progress.update(0, loss=f"{point[1]:.4g}")
            progress.update()
    if unit.number == 0 and config.snapshots:
        snapshots.append(pixels(SNAPSHOT_IMAGES))
    empty = torch.empty(0, min(len(labels), SNAPSHOT_IMAGES), 3, size, size, dtype=torch.uint8)
    return Recovered(pixels(), labels.cpu(), torch.tensor(curve), torch.stack(snapshots) if snapshots else empty)


def run(work: Work) -> None:
    """Make ``distilled/``: a file for each unit, and the manifest."""
    config, processes = work.config, work.processes
    recover = config.recover
    teacher = load_teacher(work.run / "teacher", processes.device).to(memory_format=torch.channels_last)
    normalize = Normalize(config.dataset.mean, config.dataset.std).to(processes.device)
    units = plan_units(recover.ipc, recover.images_per_class, config.dataset.num_classes, recover.classes_per_unit)
    mine = [units[number] for number in processes.share(len(units))]
    finished = [unit for unit in mine if (work.folder / unit.file).is_file()]
    done, total = len(finished) * recover.iterations, len(mine) * recover.iterations
    with Progress(total, "recover", "iteration", done=done, quiet=not processes.main) as progress:
        for unit in mine:
            if unit in finished:
                continue
            size = config.dataset.image_size
            with deterministic(processes.device):
                result = recover_unit(teacher, normalize, unit, size, recover, config.seed, progress)
            save_tensors(work.folder / unit.file, vars(result))
    processes.barrier()
    if processes.main:
        _finish(work, teacher, normalize, units)
    processes.barrier()


def _finish(work: Work, teacher: nn.Module, normalize: Normalize, units: list[Unit]) -> None:
    """Gather all units, ask the teacher what it sees in the stored pixels, write the manifest."""
    config, correct, count, final = work.config, 0, 0, []
    for unit in units:
        tensors = load_tensors(work.folder / unit.file)
        with torch.no_grad():
            answers = teacher(normalize(tensors["images"].to(work.processes.device))).argmax(dim=1).cpu()
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


def _check_finite(unit: Unit, point: list[float]) -> None:
    for name, value in zip(CURVE[1:], point[2:], strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{name} became {value} at iteration {point[0]:.0f} of unit {unit.number}; lower recover.lr or "
                f"recover.bn_weight and start a run with another name."
            )
