"""The numerical ground that every penalty stands on: inference mode, IEEE float32, unit directions."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, backends, nn
from torch.autograd import Variable

SMALLEST_NORM = 1e-12
SWITCHES: tuple[Any, ...] = operator.attrgetter(
    *("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
)(backends)
"""What has a ``fp32_precision``: IEEE float32 where that is ``ieee`` or ``none``."""


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
    """No autocast, no TF32 and, on CPUs, no bf16 for float32 inside the block: they lose g(x + hz) − g(x) by
    cancellation."""
    saved = _Precision.now()
    _switch_off()
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        saved.restore()


def ieee_backward(result: Tensor) -> Tensor:
    """Make the backward pass from ``result`` run in IEEE float32 too: it reads the switches when it runs.

    They are put back when the whole backward pass has ended.
    """
    if result.requires_grad:

        def hook(gradient: Tensor) -> Tensor:
            saved = _Precision.now()
            # Several penalties in one backward pass: the first that is met turns TF32 off, and it alone turns it on.
            if not saved.ieee:
                _switch_off()
                Variable._execution_engine.queue_callback(saved.restore)
            return gradient

        result.register_hook(hook)
    return result


def unit_direction(gradient: Tensor) -> Tensor:
    """z = g / max(‖g‖₂, 1e-12) of each sample (N, …), detached: no gradient flows through the direction (CURE)."""
    norm = gradient.flatten(1).norm(dim=1).clamp_min(SMALLEST_NORM)
    return (gradient / norm.view(-1, *[1] * (gradient.dim() - 1))).detach()


@dataclass(frozen=True)
class _Precision:
    """How torch computes in float32, by its switches and by their older names.

    Attributes:
        switches: ``fp32_precision`` of each of ``SWITCHES``.
        matmul, cudnn: by the older names; None where torch refuses to tell, because only the new ones were set.
    """

    switches: tuple[str, ...]
    matmul: str | None
    cudnn: bool | None

    @classmethod
    def now(cls) -> _Precision:
        matmul = cudnn = None
        with contextlib.suppress(RuntimeError):
            matmul = torch.get_float32_matmul_precision()
        with contextlib.suppress(RuntimeError):
            cudnn = backends.cudnn.allow_tf32
        return cls(tuple(switch.fp32_precision for switch in SWITCHES), matmul, cudnn)

    @property
    def ieee(self) -> bool:
        return set(self.switches) <= {"ieee", "none"}

    def restore(self) -> None:
        # The older names set the switches too, but not each as it was.
        if self.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.cudnn is not None:
            backends.cudnn.allow_tf32 = self.cudnn
        for switch, precision in zip(SWITCHES, self.switches, strict=True):
            # A switch that was not set follows ``torch.backends.fp32_precision``, and should go on to.
            switch.fp32_precision = "none"
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


def _switch_off() -> None:
    # By the older names as well: torch refuses to answer for them where they contradict the switches.
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = False
    for switch in SWITCHES:
        switch.fp32_precision = "ieee"
