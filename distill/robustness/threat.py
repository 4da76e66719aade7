"""A threat model: which images an attacker may show in place of a clean one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""How far outside a ball rounding may carry a pixel in [0, 1]; for L2, relative to the radius."""


@dataclass(frozen=True)
class Threat:
    """A ball around the clean image, cut with the pixel range [0, 1].

    Attributes:
        norm: ``Linf`` or ``L2``.
        radius: in [0, 1] pixels; None: anywhere in the pixel range.
    """

    norm: str = "Linf"
    radius: float | None = None

    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        """(N,) float64, in the norm; images and clean (N, C, H, W)."""
        difference = (images - clean).flatten(1).double()
        return difference.abs().amax(1) if self.norm == "Linf" else torch.linalg.vector_norm(difference, dim=1)

    def allows(self, images: Tensor, clean: Tensor) -> Tensor:
        """bool (N,): finite, in the pixel range and in the ball."""
        inside = images.flatten(1).isfinite().all(1)
        inside &= (images.flatten(1).amin(1) >= -TOLERANCE) & (images.flatten(1).amax(1) <= 1 + TOLERANCE)
        if self.radius is None:
            return inside
        slack = TOLERANCE if self.norm == "Linf" else TOLERANCE * max(1.0, self.radius)
        return inside & (self.distance(images, clean) <= self.radius + slack)
