"""What a squeeze step costs with each regulariser, as a multiple of a plain step in the same run.

    python -m benchmarks.penalty [--images 32] [--size 64] [--rounds 5] [--network resnet18]

Rounds alternate between the regularisers, so that a busy machine slows all of them; a figure is the median of the
rounds. The bound of Eq. 11 with a separate clean pass is 5.0 plain steps, counted in operations (SPEC §1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from tabulate import tabulate

from distill.compose import compose, group_choices
from distill.config import Config
from distill.data.batch import Batch
from distill.models import build_network
from distill.provenance import environment
from distill.stages.squeeze import SqueezeTask, build_task

BOUNDS = {"none": 1.0, "curvature": 5.0, "curvature_norm": 5.0}


def step_seconds(task: SqueezeTask, batch: Batch) -> float:
    """Forward and backward of one step on this thread's clock, in seconds."""
    for parameter in task.parameters():
        parameter.grad = None
    began = time.perf_counter()
    task(batch)["loss"].backward()
    if batch.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def make_task(config: Config, device: torch.device) -> SqueezeTask:
    """The squeeze task of a configuration in its best memory format."""
    network = build_network(config.teacher, config.dataset.num_classes, config.dataset.image_size, 0, "teacher")
    return build_task(config, network.to(device).to(memory_format=torch.channels_last))


def main() -> None:
    """Measure, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", default="resnet18")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (given.images, 3, given.size, given.size), dtype=torch.uint8, device=device)
    batch = Batch(images, torch.randint(0, 10, (given.images,), device=device), torch.arange(given.images))
    size = [f"dataset.image_size={given.size}", "dataset.stored_size=0", f"squeeze.batch_size={given.images}"]
    common = [*size, f"teacher.network={given.network}", "teacher.stem=imagenet", "teacher.width=64"]
    tasks = {
        name: make_task(compose([*common, f"regularizer={name}"]), device) for name in group_choices()["regularizer"]
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        step_seconds(task, batch)
    for _ in range(given.rounds):
        for name, task in tasks.items():
            seconds[name].append(step_seconds(task, batch))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians["none"] for name, median in medians.items()}
    rows = [
        (name, f"{1000 * medians[name]:.0f}", f"{ratios[name]:.2f}", BOUNDS.get(name, "–"))
        for name in sorted(ratios, key=ratios.__getitem__)
    ]
    print(tabulate(rows, headers=["regularizer", "ms per step", "plain steps", "operation count"]))
    settings = {**vars(given), "device": device.type}
    print(json.dumps({"ratios": ratios, "floors": BOUNDS, "settings": settings, "environment": environment()}))


if __name__ == "__main__":
    main()
