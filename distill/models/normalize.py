"""From bytes or [0, 1] pixels to what a network sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract the channel means and divide by the channel deviations.

    Args:
        mean, std: three numbers each, in [0, 1] pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 or [0, 1] float images (N, 3, H, W) → normalised float32 images."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images - self.mean) / self.std

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) → [0, 1] pixels."""
        return images * self.std + self.mean

    def clamp_(self, images: Tensor) -> Tensor:
        """Clamp normalised images in place to those that are pixels in [0, 1]."""
        low, high = -self.mean / self.std, (1 - self.mean) / self.std
        return images.clamp_(low, high)
