"""Batch-norm matching of SRe²L: synthetic images should have the feature statistics of the real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class BatchNormMatching:
    """Collects the matching loss of every forward pass inside ``batchnorm_matching``.

    Args:
        first_multiplier: m of the first batch-norm layer; the others have m = 1.
    """

    def __init__(self, first_multiplier: float):
        self.first_multiplier = first_multiplier
        self._terms: list[Tensor] = []

    def add(self, layer: nn.BatchNorm2d, features: Tensor) -> None:
        """Add one layer's ‖μ(x) − running mean‖₂ + ‖σ²(x) − running var‖₂, σ² the biased variance."""
        variance, mean = torch.var_mean(features, dim=(0, 2, 3), correction=0)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        distance = torch.linalg.vector_norm(mean - layer.running_mean)
        distance = distance + torch.linalg.vector_norm(variance - layer.running_var)
        self._terms.append(distance if self._terms else self.first_multiplier * distance)

    def pop(self) -> Tensor:
        """The sum over layers since the last call, a scalar that is differentiable in the images."""
        if not self._terms:
            raise RuntimeError("no forward pass through a batch-norm layer since the last pop()")
        total = torch.stack(self._terms).sum()
        self._terms.clear()
        return total


@contextlib.contextmanager
def batchnorm_matching(network: nn.Module, first_multiplier: float = 10.0) -> Iterator[BatchNormMatching]:
    """Collect Σ_l m_l (‖μ_l − running mean‖₂ + ‖σ²_l − running var‖₂) of every forward inside (SRe²L, recover).

    Args:
        network: a network with BatchNorm2d layers that keep running statistics, in eval mode.
        first_multiplier: m of the first layer.

    Yields:
        A collector; call its ``pop()`` once after each forward pass.
    """
    collector = BatchNormMatching(first_multiplier)

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        collector.add(layer, inputs[0])

    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        raise ValueError("the network has no BatchNorm2d layer to match")
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()
