"""The ConvNet of the dataset-condensation line (Zhao et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, instance normalisation, ReLU and 2x2 average pooling, then one linear layer.

    Args:
        width: channels of every convolution (128 in the papers).
        depth: number of blocks (3 for 32-pixel images, 4 for 64).
        image_size: height and width of the images, which fixes the size of the linear layer.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 128, depth: int = 3):
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for _ in range(depth):
            blocks += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(width, width, affine=True),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels = width
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (image_size // 2**depth) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) → logits (N, classes)."""
        return self.classifier(torch.flatten(self.features(images), 1))
