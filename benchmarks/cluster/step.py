"""What a step consists of: floating-point operations, operations of PyTorch, and the checkpoint after it.

    python -m benchmarks.cluster.step

Counted on the CPU, for ResNet18 and 1000 classes; prints one JSON object, which stands in docs/results/scaling.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.communication import CLASSES, sizes
from distill.compose import compose
from distill.config import Config, RecoverConfig
from distill.data.batch import Batch
from distill.models import Inference, Normalize, build_network
from distill.provenance import environment
from distill.randomness import generator
from distill.recovery import Iteration, build_objective
from distill.stages.squeeze import build_task
from distill.training.engine import build_engine
from distill.training.processes import Processes
from distill.training.schedule import build_optimizer

SIZE = 32
"""Pixels of the images where the number of operations does not depend on them."""
VIEWS = frozenset({"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "alias"})
VIEWS |= {"unsqueeze", "squeeze", "split", "unbind", "as_strided", "_reshape_alias", "reshape", "is_same_size"}
"""Operations that ask nothing of a GPU."""


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.total += function.overloadpacket.__name__ not in VIEWS
        return function(*arguments, **(options or {}))


def operations(step: Callable[[], object]) -> int:
    """Operations of PyTorch in a step, its backward pass included."""
    with _Count() as count:
        step()
    return count.total


def forward_operations() -> int:
    """Floating-point operations of a forward pass on one image of 224 pixels; a multiplication and addition are two."""
    network = build_network(_config("none").teacher, CLASSES, 224, 0, "teacher").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 224, 224))
    return int(counter.get_total_flops())


def _config(regularizer: str) -> Config:
    return compose(
        [
            *("dataset=imagenet1k", f"regularizer={regularizer}", "teacher.network=resnet18", "teacher.stem=imagenet"),
            *("dataset.stored_size=0", f"dataset.image_size={SIZE}", "squeeze.batch_size=4"),
        ]
    )


def training_step(regularizer: str) -> Callable[[], Tensor | None]:
    """Forward and backward pass of the squeeze."""
    config = _config(regularizer)
    task = build_task(config, build_network(config.teacher, CLASSES, SIZE, 0, "teacher"))
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = Batch(images, torch.arange(4), torch.arange(4))
    return lambda: task(batch)["loss"].backward()


def recovery(network: nn.Module) -> Callable[[], object]:
    """An iteration of recovery, eager."""
    config = RecoverConfig()
    iterate = Iteration(
        build_objective([network], config, 4),
        Normalize([0.5] * 3, [0.5] * 3),
        torch.randn(4, 3, SIZE, SIZE),
        torch.arange(4),
        config,
        generator(0, "benchmark"),
    )
    return lambda: iterate(0)


def checkpoint(rounds: int = 15) -> tuple[float, int]:
    """Seconds to write a checkpoint of the squeeze to this machine's disk, the fastest time, and its bytes."""
    config = _config("none")
    network = build_network(config.teacher, CLASSES, SIZE, 0, "teacher")
    engine = build_engine(config.engine, Processes(0, 1, torch.device("cpu")))
    optimizer, schedule = build_optimizer(network, config.squeeze, 50, 1000)
    engine.prepare(build_task(config, network), optimizer, schedule)
    engine.step(Batch(torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8), torch.arange(4), torch.arange(4)))
    seconds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for _ in range(rounds):
            began = time.perf_counter()
            engine.save(Path(folder))
            seconds.append(time.perf_counter() - began)
        return min(seconds), sum(path.stat().st_size for path in Path(folder).iterdir())


def main() -> None:
    """Count, and print one JSON object."""
    parameters, running = sizes("resnet18")
    network = build_network(_config("none").teacher, CLASSES, SIZE, 0, "teacher").eval().requires_grad_(False)
    teacher = Inference(network, Normalize([0.5] * 3, [0.5] * 3), batch_size=4)
    steps = {
        "plain": training_step("none"),
        "curvature": training_step("curvature"),
        "recover": recovery(network),
        "relabel": lambda: teacher(torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)),
    }
    seconds, size = checkpoint()
    result = {
        "forward": forward_operations(),
        "operations": {name: operations(step) for name, step in steps.items()},
        "parameters": parameters,
        "statistics": running,
        "checkpoint_seconds": seconds,
        "checkpoint_bytes": size,
        "environment": environment(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
