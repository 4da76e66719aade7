"""Batch norm folded into the convolutions of a network that is lent to attacks: fewer passes over memory."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from distill.models.inference import fold
from distill.models.resnet import ResNet
from distill.models.unaltered import unaltered

LAYERS = frozenset(
    {
        *(nn.Sequential, ResNet, BasicBlock, Bottleneck, nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU, nn.Identity),
        *(nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    }
)
"""What a part consists of that is folded. Folding follows what a network does with one image that has no values, which
tells nothing of code that decides by the values; these do not."""


def folded(model: nn.Module) -> nn.Module:
    """The same function of images, with the batch norm of its plain parts folded; the model stays as it is.

    A part is plain if it consists of ``LAYERS`` alone, in float32, none used twice, none with a hook. Looked at are the
    model and, where it is a Sequential, what that holds. Logits differ by rounding, 1e-6 of the largest.

    Args:
        model: in eval mode.

    Returns:
        The model itself where there is nothing to fold; else one that shares with it what is not folded.
    """
    if _plain(model):
        # A batch norm alone has no convolution to go into.
        within = any(type(layer) is nn.BatchNorm2d for layer in model.modules() if layer is not model)
        return fold(model, torch.float32) if within else model
    if type(model) is not nn.Sequential or not unaltered(model):
        return model
    parts = [folded(part) for part in model]
    return model if all(a is b for a, b in zip(parts, model, strict=True)) else nn.Sequential(*parts)


def _plain(part: nn.Module) -> bool:
    layers = [layer for _, layer in part.named_modules(remove_duplicate=False)]
    tensors = [*part.parameters(), *part.buffers()]
    return (
        all(type(layer) in LAYERS and unaltered(layer) for layer in layers)
        and len(layers) == len(set(layers))
        and all(each.dtype == torch.float32 for each in tensors if each.is_floating_point())
    )
