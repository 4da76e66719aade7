"""g(x) = ∇_x ℓ(f(x), y), the gradient of each sample's loss in its own pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, classes), labels (N,)) → losses (N,)."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def input_gradient(network: nn.Module, labels: Tensor, loss: Loss = cross_entropy) -> Callable[[Tensor], Tensor]:
    """The function g: images (N, …) → gradients of the same shape, differentiable in images and parameters.

    The SUM of the per-sample losses is differentiated, so samples do not mix and their number does not matter.
    """
    return torch.func.grad(lambda images: loss(network(images), labels).sum())
