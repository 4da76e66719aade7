"""What runs optimiser steps: the contract, and the engine by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.config import EngineConfig
from distill.errors import NonFiniteError
from distill.training.processes import Processes


class Task(nn.Module):
    """The whole loss of one step: forward maps a batch to ``{"loss": scalar, named terms}``.

    Attributes:
        network: what is trained.
    """

    network: nn.Module


class Engine(Protocol):
    """One optimiser step at a time. Every engine gives the same parameters for the same data."""

    step_count: int

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""

    def prepare(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        accumulation: int = 1,
        ema: float = 0.0,
    ) -> None:
        """Take a task.

        Args:
            accumulation: micro-batches that a batch is cut into.
            ema: decay of a moving average of ``task.network``; 0 keeps none.
        """

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One optimiser step on this rank's share of a batch; returns the terms, mean over micro-batches.

        Raises:
            NonFiniteError: before the parameters are changed.
        """

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on; called on rank 0."""

    def load(self, folder: Path) -> None:
        """Continue from what ``save`` wrote; called on every rank."""

    def trained_network(self) -> nn.Module:
        """``task.network``, or its moving average."""


def build_engine(config: EngineConfig, processes: Processes) -> Engine:
    """The engine of the module ``distill.training.<name>_engine``."""
    module = importlib.import_module(f"distill.training.{config.name}_engine")
    engine: Engine = module.build(config, processes)
    return engine


SUMS = ("loss", "parameter_gradient")
"""What becomes NaN whenever a term does."""


def check_finite(terms: Mapping[str, Tensor], step: int) -> None:
    """Raise NonFiniteError that names the step and the first term that is NaN or infinite."""
    if all(torch.stack([torch.isfinite(term).all() for term in terms.values()]).tolist()):
        return
    wrong = [name for name in terms if not torch.isfinite(terms[name]).all()]
    # A term of the loss tells more than the sum, and the sum more than the gradient.
    causes = sorted(wrong, key=lambda name: SUMS.index(name) + 1 if name in SUMS else 0)
    raise NonFiniteError(
        f"{causes[0]} became {terms[causes[0]].item()} at step {step}; nothing of this step was kept. Lower the "
        f"learning rate or the weight of the regulariser, and start a run with another name."
    )
