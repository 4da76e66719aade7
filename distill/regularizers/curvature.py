"""GUARD: curvature regularisation (paper Eq. 9-11; SPEC §1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from distill.regularizers.base import SteppingRegularizer
from distill.regularizers.input_gradient import Loss, cross_entropy, input_gradient
from distill.regularizers.numerics import ieee_backward, ieee_float32, inference_mode_layers, unit_direction


def gradient_change(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    h: float,
    loss: Loss = cross_entropy,
    direction: Tensor | None = None,
) -> Tensor:
    """∇ℓ(x + h z) − ∇ℓ(x) of each sample, shape of ``images``: h times the Hessian along z (Eq. 9-10)."""
    with inference_mode_layers(network), ieee_float32(images.device.type):
        g = input_gradient(network, labels, loss)
        at_x = g(images)
        z = unit_direction(at_x) if direction is None else direction
        return g(images + h * z) - at_x


def curvature_penalty(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    h: float,
    loss: Loss = cross_entropy,
    direction: Tensor | None = None,
) -> Tensor:
    """R(x) = ‖∇ℓ(x + h z) − ∇ℓ(x)‖₂² of each sample (Eq. 11), z = ∇ℓ(x) / ‖∇ℓ(x)‖₂ held constant.

    Runs with batch norm in eval mode and in IEEE float32 (no autocast, no TF32, in the backward pass too), whatever
    surrounds it; leaves the network as it was.

    Args:
        images: (N, …), normalised; float32, or float64 with a float64 network.
        labels: whatever ``loss`` takes, int64 (N,) for cross-entropy.
        h: length of the step, L2 over the values of one image in normalised units.
        loss: (outputs, labels) → losses (N,).
        direction: replaces z, shape of ``images``.

    Returns:
        (N,), differentiable in the parameters by true double backward.
    """
    change = gradient_change(network, images, labels, h, loss, direction)
    return ieee_backward(change.flatten(1).square().sum(dim=1))


@dataclass
class Curvature(SteppingRegularizer):
    """ℓ_R = mean ℓ(x) + λ · mean R(x) (Eq. 11): ``weight`` is λ."""

    weight: float
    h: float
    h_scaling: bool = True

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        curvature = curvature_penalty(network, images, labels, self.step_length(images)).mean()
        return {"penalty": self.weight * curvature, "curvature": curvature.detach()}


REGULARIZER = Curvature
