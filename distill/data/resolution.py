"""The side of training images in each epoch: constant, or rising as in ffcv-imagenet (progressive resizing)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.config import Config


@dataclass(frozen=True)
class Resolution:
    """The side of a training image, in pixels.

    Attributes:
        first, last: side before and after the ramp.
        start, end: epochs where the ramp begins and ends; between them the side rises linearly.
        step: sides are multiples of this.
    """

    first: int
    last: int
    start: float = 0.0
    end: float = 0.0
    step: int = 1

    def at(self, epoch: int) -> int:
        """The side in an epoch, counted from 0."""
        if self.first == self.last:
            return self.first
        if self.start == self.end:
            return self.last if epoch >= self.end else self.first
        side = np.interp(epoch, [self.start, self.end], [self.first, self.last])
        return max(self.step, round(float(side) / self.step) * self.step)


def training_resolution(config: Config) -> Resolution:
    """What ``loader.resolution`` asks for over the epochs of squeeze."""
    loader, size = config.loader, config.dataset.image_size
    if loader.resolution == "constant" or loader.sizes is None:
        return Resolution(size, size)
    start, end = loader.ramp or (0.74, 0.86)
    epochs = config.squeeze.epochs
    return Resolution(loader.sizes[0], loader.sizes[1], start * epochs, end * epochs, loader.size_step or 32)
