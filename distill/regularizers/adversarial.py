"""Adversarial training with PGD examples, "SRe²L + Adv" of the paper's Table 1 (SPEC §1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.regularizers.base import Regularizer
from distill.regularizers.input_gradient import input_gradient
from distill.regularizers.numerics import inference_mode_layers


@dataclass
class Adversarial(Regularizer):
    """Replace the training images by L∞ PGD examples of the network in eval mode.

    Attributes:
        epsilon: radius of the ball, in 1/255 of the pixel range.
        step_size: length of one step, in 1/255.
        steps: number of steps.
        random_start: start at a uniform point of the ball.
    """

    epsilon: float
    step_size: float
    steps: int
    random_start: bool

    def training_images(
        self, network: nn.Module, images: Tensor, labels: Tensor, seeds: Callable[[], list[int]]
    ) -> Tensor:
        mean, std = (
            torch.tensor(list(values), device=images.device).view(1, -1, 1, 1)
            for values in (self.surroundings.mean, self.surroundings.std)
        )
        radius, step = self.epsilon / 255 / std, self.step_size / 255 / std
        low = (images - radius).maximum(-mean / std)
        high = (images + radius).minimum((1 - mean) / std)
        attacked = images
        if self.random_start:
            noise = [torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds()]
            attacked = images + radius * (2 * torch.stack(noise).to(images) - 1)
        with inference_mode_layers(network), torch.no_grad():
            gradient = input_gradient(network, labels)
            for _ in range(self.steps):
                attacked = attacked.clamp(low, high)
                attacked = attacked + step * gradient(attacked).sign()
        return attacked.clamp(low, high)


REGULARIZER = Adversarial
