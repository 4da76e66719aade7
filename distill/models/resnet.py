"""torchvision's ResNets with the stems that small images need, at any width."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet

STEMS = {"imagenet": (7, 2, 3), "stride1": (3, 1, 1), "stride2": (3, 2, 1), "stride2_pad3": (3, 2, 3)}
"""Kernel, stride and padding of the first convolution; only ``imagenet`` is followed by a max-pool."""

BLOCKS: dict[str, tuple[type[resnet.BasicBlock] | type[resnet.Bottleneck], list[int]]] = {
    "resnet10": (resnet.BasicBlock, [1, 1, 1, 1]),
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
}


class ResNet(resnet.ResNet):
    """A torchvision ResNet; with ``stem="imagenet"`` and ``width=64`` its weights fit torchvision's.

    Args:
        network: a key of ``BLOCKS``.
        stem: a key of ``STEMS``.
        width: channels of the first stage; torchvision's is 64.
    """

    def __init__(self, network: str, num_classes: int, stem: str = "imagenet", width: int = 64):
        block, layers = BLOCKS[network]
        self._scale = width / 64
        super().__init__(block, layers, num_classes=num_classes)
        if width != 64 or stem != "imagenet":
            kernel, stride, padding = STEMS[stem]
            self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(width)
        if width != 64:
            self.fc = nn.Linear(round(512 * self._scale) * block.expansion, num_classes)
        if stem != "imagenet":
            self.maxpool = nn.Identity()

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):  # type: ignore[no-untyped-def]
        if planes == 64:
            self.inplanes = round(64 * self._scale)
        return super()._make_layer(block, round(planes * self._scale), blocks, stride, dilate)
