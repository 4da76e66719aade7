"""Gradient regularisation, the rival of the paper's Table 3 (SPEC §1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.regularizers.base import Regularizer
from distill.regularizers.input_gradient import input_gradient
from distill.regularizers.numerics import ieee_backward, ieee_float32, inference_mode_layers


@dataclass
class GradientNorm(Regularizer):
    """λ_g · mean_i ‖∇ℓ(x_i)‖₂, differentiable in the parameters: ``weight`` is λ_g."""

    weight: float

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with inference_mode_layers(network), ieee_float32(images.device.type):
            gradient = input_gradient(network, labels)(images).flatten(1)
            norm = torch.linalg.vector_norm(gradient, dim=1).mean()
        norm = ieee_backward(norm)
        return {"penalty": self.weight * norm, "gradient_norm": norm.detach()}


REGULARIZER = GradientNorm
