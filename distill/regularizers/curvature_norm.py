"""The curvature term of the released CIFAR code: not squared, gradients of the batch-mean loss (SPEC §1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.regularizers.base import SteppingRegularizer
from distill.regularizers.curvature import gradient_change
from distill.regularizers.numerics import ieee_backward


@dataclass
class CurvatureNorm(SteppingRegularizer):
    """λ · mean_i ‖g(x_i + h z_i) − g(x_i)‖₂, with g the gradient of the mean loss over the global batch."""

    weight: float
    h: float
    h_scaling: bool = True

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        change = gradient_change(network, images, labels, self.step_length(images)).flatten(1)
        norm = ieee_backward(torch.linalg.vector_norm(change, dim=1).mean() / self.surroundings.batch_size)
        return {"penalty": self.weight * norm, "curvature_norm": norm.detach()}


REGULARIZER = CurvatureNorm
