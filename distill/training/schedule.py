"""Learning rates and optimisers by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from distill.config import EvaluateConfig, SqueezeConfig


def learning_rate_factor(
    schedule: str, total: int, warmup: int = 0, milestones: Iterable[int] = (), factor: float = 0.1
) -> Callable[[int], float]:
    """The factor of the peak learning rate at each step, a pure function of the step.

    Args:
        schedule: cosine or linear (from 1 to 0 after the warm-up), step, or constant.
        total: number of steps.
        warmup: steps over which the factor rises linearly from 1 / warmup to 1.
        milestones: steps after which schedule=step multiplies by ``factor``.
    """
    steps = sorted(milestones)

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        if schedule == "cosine":
            return (1 + math.cos(math.pi * share)) / 2
        if schedule == "linear":
            return 1 - share
        if schedule == "step":
            return factor ** sum(step >= milestone for milestone in steps)
        return 1.0

    return at


def build_optimizer(
    network: nn.Module, config: SqueezeConfig | EvaluateConfig, epochs: int, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The optimiser of a network, and its schedule, which is to be stepped after every optimiser step."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    factor = learning_rate_factor(
        config.schedule,
        total=epochs * steps_per_epoch,
        warmup=round(config.warmup_epochs * steps_per_epoch),
        milestones=[round(epoch * steps_per_epoch) for epoch in config.step_epochs],
        factor=config.step_factor,
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
