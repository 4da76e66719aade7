"""The numerical ground that every penalty stands on: inference mode, IEEE float32, unit directions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import Variable

SMALLEST_NORM = 1e-12


@contextlib.contextmanager
def inference_mode_layers(network: nn.Module) -> Iterator[None]:
    """Every layer in eval mode inside the block: running statistics are read and not updated."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def ieee_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32 inside the block. bf16 and TF32 lose g(x + hz) − g(x) by cancellation."""
    saved = _tf32()
    _switch_tf32((False, False))
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        _switch_tf32(saved)


def ieee_backward(result: Tensor) -> Tensor:
    """Make the backward pass from ``result`` run without TF32, which has its own switch there.

    The switch is put back when the whole backward pass has ended.
    """
    if result.requires_grad:

        def hook(gradient: Tensor) -> Tensor:
            saved = _tf32()
            # Several penalties in one backward pass: the first that is met turns TF32 off, and it alone turns it on.
            if saved != (False, False):
                _switch_tf32((False, False))
                Variable._execution_engine.queue_callback(functools.partial(_switch_tf32, saved))
            return gradient

        result.register_hook(hook)
    return result


def unit_direction(gradient: Tensor) -> Tensor:
    """z = g / max(‖g‖₂, 1e-12) of each sample (N, …), detached: no gradient flows through the direction (CURE)."""
    norm = gradient.flatten(1).norm(dim=1).clamp_min(SMALLEST_NORM)
    return (gradient / norm.view(-1, *[1] * (gradient.dim() - 1))).detach()


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def _switch_tf32(wanted: tuple[bool, bool]) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = wanted
