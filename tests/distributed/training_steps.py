"""A small squeeze on scikit-learn's digits, in whatever process group and with whatever engine: what tests compare."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from distill.config import EngineConfig, NetworkConfig, RegularizerConfig
from distill.data.batch import Batch
from distill.models import Normalize, build_network, synchronise_batchnorm
from distill.regularizers import Surroundings, build_regularizer
from distill.regularizers.numerics import inference_mode_layers
from distill.stages.squeeze import SqueezeTask
from distill.training.base_engine import BaseEngine
from distill.training.engine import Engine, build_engine
from distill.training.processes import Processes

ENGINES = {
    "torch": EngineConfig("torch"),
    **{f"deepspeed_zero{stage}": EngineConfig("deepspeed", stage) for stage in (0, 1, 2)},
}
REGULARIZERS = {
    "none": RegularizerConfig("none"),
    "curvature": RegularizerConfig("curvature", weight=5.0, h=0.5),
    "adversarial": RegularizerConfig("adversarial", epsilon=8.0, step_size=4.0, steps=2, random_start=True),
}
SIZES = (16, 16, 16, 16, 14)
"""Images of each global batch; four ranks get 4, 4, 3 and 3 of the last."""
MEAN, STD = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)


class InDouble(Normalize):
    """Normalised images in float64."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.double() / 255 - self.mean) / self.std


class InnerGradient(SqueezeTask):
    """Adds the squared input gradient of the loss, taken with autograd.grad inside forward."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().forward(batch)
        images = self.normalize(batch.images).requires_grad_()
        with inference_mode_layers(self.network):
            loss = torch.nn.functional.cross_entropy(self.network(images), batch.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
        return {**terms, "loss": terms["loss"] + 0.1 * gradient.square().sum() / len(batch)}


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """uint8 (1797, 3, 16, 16) and int64 (1797,); reading them takes as long as a step."""
    digits = load_digits()
    images = torch.from_numpy(digits.images * 255 / 16).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    images = torch.nn.functional.interpolate(images.float(), 16).to(torch.uint8)
    return images, torch.from_numpy(digits.target).long()


def shares(processes: Processes, sizes: tuple[int, ...] = SIZES) -> Iterator[Batch]:
    """This rank's share of each global batch, which is the same at every world size."""
    images, labels = _digits()
    first = 0
    for size in sizes:
        own = torch.arange(first, first + size).tensor_split(processes.world_size)[processes.rank]
        weight = len(own) * processes.world_size / size
        yield Batch(images[own], labels[own], own, 0, weight).to(processes.device)
        first += size


def make(
    processes: Processes,
    engine: str | EngineConfig = "torch",
    regularizer: str = "none",
    *,
    batchnorm: str = "sync",
    dtype: torch.dtype = torch.float32,
    optimizer: str = "sgd",
    accumulation: int = 1,
    batch_size: int = 16,
    ema: float = 0.0,
    lr: float = 0.05,
    kind: type[SqueezeTask] = SqueezeTask,
) -> BaseEngine:
    """An engine with a ResNet10 of width 4 that is the same in every process."""
    network = build_network(NetworkConfig("resnet10", "stride2", 4), 10, 16, 0, "teacher").to(dtype)
    network = network.to(processes.device).to(memory_format=torch.channels_last)
    if batchnorm == "sync":
        network = synchronise_batchnorm(network)
    if batchnorm == "frozen":
        draw = torch.Generator().manual_seed(0)
        for layer in [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
            for buffer, low, high in ((layer.running_mean, -0.1, 0.1), (layer.running_var, 0.5, 1.5)):
                assert buffer is not None
                buffer.copy_(low + (high - low) * torch.rand(buffer.shape, generator=draw))
    normalize = (InDouble if dtype == torch.float64 else Normalize)(MEAN, STD).to(processes.device)
    built = build_regularizer(REGULARIZERS[regularizer], Surroundings(MEAN, STD, 16, 16))
    task = kind(network.train(), normalize, built, frozen=batchnorm == "frozen")
    parameters = list(network.parameters())
    stepping: torch.optim.Optimizer
    if optimizer == "sgd":
        stepping = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
    else:
        stepping = torch.optim.AdamW(parameters, lr=lr / 10, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepping, lambda step: 1 / (1 + step))
    prepared = build_engine(ENGINES[engine] if isinstance(engine, str) else engine, processes)
    assert isinstance(prepared, BaseEngine)
    prepared.prepare(task, stepping, schedule, accumulation, ema, batch_size)
    return prepared


def weights(engine: Engine) -> dict[str, Tensor]:
    """A copy of every parameter and running statistic of the trained network."""
    state = engine.trained_network().state_dict()
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def run(engine: Engine, batches: list[Batch]) -> list[dict[str, float]]:
    """The terms of each step."""
    return [{name: term.item() for name, term in engine.step(batch).items()} for batch in batches]


def save(engine: Engine, folder: Path, processes: Processes) -> None:
    """A checkpoint that every rank can read when this returns."""
    engine.save(folder)
    processes.barrier()


@contextlib.contextmanager
def deepspeed_in_double() -> Iterator[None]:
    """ZeRO 1 and 2 keep float32 masters whatever the task is: here they keep, add up and send float64.

    Only so can a difference in what is computed be told from rounding; the product trains in float32.
    """
    from deepspeed import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    original = DeepSpeedZeroOptimizer.__init__

    def construct(self: Any, *arguments: Any, reduce_scatter: bool = True, **options: Any) -> None:
        double = {"gradient_accumulation_dtype": torch.float64, "communication_data_type": torch.float64}
        # Its constructor refuses to scatter float64, which its code can do.
        original(self, *arguments, **{**options, **double}, reduce_scatter=False)
        self.reduce_scatter = reduce_scatter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedZeroOptimizer, "__init__", construct)
        patch.setattr(DeepSpeedZeroOptimizer, "_configure_master_weights", lambda self, **options: torch.float64)
        patch.setattr(DeepSpeedEngine, "communication_data_type", torch.float64)
        patch.setattr(type(get_accelerator()), "supported_dtypes", lambda self: [torch.float64])
        yield
