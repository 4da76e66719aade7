"""Networks by name."""

from __future__ import annotations

from torch import nn

from distill.config import NetworkConfig
from distill.models.convnet import ConvNet
from distill.models.resnet import ResNet
from distill.randomness import seeded


def build_network(config: NetworkConfig, num_classes: int, image_size: int, seed: int, purpose: str) -> nn.Module:
    """A freshly initialised network; its weights are a function of (seed, purpose) alone.

    Args:
        image_size: height and width of the images in pixels.
        purpose: what it is for, for instance ``"teacher"``.
    """
    with seeded(seed, f"weights:{purpose}"):
        if config.network == "convnet":
            return ConvNet(num_classes, image_size, config.width)
        return ResNet(config.network, num_classes, config.stem, config.width)
