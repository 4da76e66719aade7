"""A model handed to an attack, and taken back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class _Lent(nn.Module):
    """What an attack sees of a model, until it is taken back.

    torchattacks keeps every object that was ever assigned to an attack's attribute in a list of its module, for ever:
    without this every student that was attacked would stay in memory.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__()
        # torchattacks asks the first parameter for the device; a model may have none.
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.model: nn.Module | None = model

    def forward(self, images: Tensor) -> Tensor:
        assert self.model is not None
        return self.model(images)


@contextlib.contextmanager
def lent(model: nn.Module) -> Iterator[tuple[nn.Module, torch.device]]:
    """The model in eval mode, its parameters fixed, cuDNN deterministic; all is put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    device = wanted[0][0].device if wanted else torch.device("cpu")
    handle = _Lent(model, device)
    try:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield handle.eval(), device
    finally:
        handle.model = None
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
