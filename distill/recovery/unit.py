"""One unit of recovery: a batch of images with its own seed, optimised until the teacher takes it for real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.config import RecoverConfig
from distill.data.distilled_set import Unit
from distill.errors import NonFiniteError
from distill.models import Normalize
from distill.progress import Progress
from distill.randomness import generator, seed_for
from distill.recovery.objective import Objective
from distill.recovery.views import augment, uniforms_shape

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


class Iteration:
    """The optimisation of one unit's images, one iteration at a call.

    Args:
        objective: of ``build_objective``.
        normalize: its device is used.
        images: float32 (N, 3, S, S), normalised, where it starts.
        labels: int64 (N,).
        random: draws the views.
    """

    def __init__(
        self,
        objective: Objective,
        normalize: Normalize,
        images: Tensor,
        labels: Tensor,
        config: RecoverConfig,
        random: np.random.Generator,
    ):
        self.objective, self.normalize, self.config, self.random = objective, normalize, config, random
        device = normalize.mean.device
        self.labels = labels.to(device)
        self.images = images.to(device, memory_format=torch.channels_last).requires_grad_()
        betas = config.betas[0], config.betas[1]
        self.optimizer = torch.optim.Adam([self.images], lr=config.lr, betas=betas, eps=1e-8, fused=True)

    def __call__(self, number: int) -> Tensor:
        """Iteration ``number``; gives the terms of ``CURVE`` before it, float32 (3,)."""
        share = number / self.config.iterations
        self.optimizer.param_groups[0]["lr"] = self.config.lr * (1 + math.cos(math.pi * share)) / 2
        view = augment(
            self.images, self.config, number, self.random.random(uniforms_shape(self.config, len(self.labels)))
        )
        terms, slope = self.objective(view, self.labels)
        (gradient,) = torch.autograd.grad(view, [self.images], slope)
        # Fused Adam on CPUs pairs numbers by their place in memory, whatever the strides say.
        self.images.grad = gradient.contiguous(memory_format=torch.channels_last)
        self.optimizer.step()
        self.normalize.clamp_(self.images.data)
        return terms

    def pixels(self, count: int | None = None) -> Tensor:
        """The first images as they are now, uint8 (count, 3, S, S), on the CPU."""
        shown = self.normalize.pixels(self.images.detach()[:count])
        return (shown * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()


def recover_unit(
    objective: Objective,
    normalize: Normalize,
    unit: Unit,
    size: int,
    config: RecoverConfig,
    seed: int,
    progress: Progress,
    start: Tensor | None = None,
) -> Recovered:
    """Recover one unit; its result is a function of the objective, the configuration, the seed and its number.

    Args:
        objective: of ``build_objective``.
        normalize: its device is used.
        size: height and width of the images in pixels.
        start: float32 (N, 3, size, size), normalised, to optimise in place of noise; with ``recover.iterations=0`` they
            are kept, and the curve holds the losses of the whole images at that.

    Raises:
        NonFiniteError: naming unit, iteration and term.
    """
    if start is None:
        noise = torch.Generator().manual_seed(seed_for(seed, "recover:noise", unit.number))
        start = torch.randn(len(unit.labels), 3, size, size, generator=noise)
    random = generator(seed, "recover:view", unit.number)
    iterate = Iteration(objective, normalize, start, unit.labels, config, random)
    curve, snapshots = [], []
    for number in range(config.iterations):
        if unit.number == 0 and number in config.snapshots:
            snapshots.append(iterate.pixels(SNAPSHOT_IMAGES))
        terms = iterate(number)
        if number % config.curve_every == 0 or number == config.iterations - 1:
            point = [number, *terms.tolist()]
            _check_finite(unit, point)
            curve.append(point)
            progress.update(0, loss=f"{point[1]:.4g}")
        progress.update()
    if not config.iterations:
        # Real images as they are: their losses are what distilled ones are compared with.
        terms, _ = objective(iterate.images, iterate.labels)
        curve.append([0, *terms.tolist()])
        _check_finite(unit, curve[0])
        progress.update()
    if unit.number == 0 and config.snapshots:
        snapshots.append(iterate.pixels(SNAPSHOT_IMAGES))
    empty = torch.empty(0, min(len(start), SNAPSHOT_IMAGES), 3, size, size, dtype=torch.uint8)
    return Recovered(iterate.pixels(), unit.labels, torch.tensor(curve), torch.stack(snapshots) if snapshots else empty)


def _check_finite(unit: Unit, point: list[float]) -> None:
    for name, value in zip(CURVE[1:], point[2:], strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{name} became {value} at iteration {point[0]:.0f} of unit {unit.number}; lower recover.lr or "
                f"recover.bn_weight and start a run with another name."
            )
