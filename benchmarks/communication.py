"""Bytes that the ranks of a squeeze send each other in a step, counted by the kernel, beside the formula.

    python -m benchmarks.communication [--engines torch deepspeed_zero0 …] [--steps 3] [--world-size 2]

The ranks are processes on this machine with gloo, in a network name space of their own where that can be made, so that
nobody else's loopback traffic is counted. The network is ResNet18 for 1000 classes; images are small, for the volume
does not depend on them. After a step that warms up, a figure is what passed through loopback in ``--steps`` steps:
every byte is counted once, with the headers of TCP/IP.

Formula: a ring all-reduce of S bytes over N ranks sends 2 (N − 1) / N · S from each, and so do a reduce-scatter and an
all-gather together, as ZeRO 1 and 2 need them: (N − 1) / N · S each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from distill.compose import compose
from distill.config import Config, NetworkConfig
from distill.data.batch import Batch
from distill.models import build_network
from distill.provenance import environment
from distill.stages.squeeze import build_task
from distill.training.engine import Engine, build_engine
from distill.training.processes import Processes, processes
from distill.training.schedule import build_optimizer

ENGINES = ("torch", "deepspeed_zero0", "deepspeed_zero1", "deepspeed_zero2")
CLASSES = 1000


def volume(parameters: int, statistics: int, world_size: int) -> dict[str, float]:
    """Bytes that one rank sends in a step, float32.

    Args:
        parameters: numbers in the gradient.
        statistics: numbers in the running statistics of batch norm, which are averaged after every step.
    """
    ring = 2 * (world_size - 1) / world_size
    return {"gradients": ring * 4 * parameters, "statistics": ring * 4 * statistics}


def sizes(network: str) -> tuple[int, int]:
    """(parameters, running means and variances) of a network for 1000 classes."""
    built = build_network(NetworkConfig(network, "imagenet", 64), CLASSES, 224, 0, "teacher")
    names = [name for name, _ in built.named_buffers() if name.endswith(("running_mean", "running_var"))]
    statistics = sum(built.get_buffer(name).numel() for name in names)
    return sum(parameter.numel() for parameter in built.parameters()), statistics


def loopback() -> int:
    """Bytes that loopback has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise RuntimeError("there is no loopback interface")


def make_engine(name: str, given: argparse.Namespace, group: Processes) -> Engine:
    """A squeeze of ImageNet-1K's classes, at small images."""
    config: Config = compose(
        [
            *(f"engine={name}", "dataset=imagenet1k", "regularizer=none"),
            *(f"teacher.network={given.network}", "teacher.stem=imagenet", "dataset.stored_size=0"),
            *(f"dataset.image_size={given.size}", f"squeeze.batch_size={2 * group.world_size}"),
        ]
    )
    network = build_network(config.teacher, CLASSES, given.size, 0, "teacher").to(memory_format=torch.channels_last)
    engine = build_engine(config.engine, group)
    optimizer, schedule = build_optimizer(network, config.squeeze, 50, 1000)
    engine.prepare(build_task(config, network), optimizer, schedule, batch_size=2 * group.world_size)
    return engine


def work(given: argparse.Namespace) -> None:
    """One rank: steps of every engine; rank 0 writes the bytes of all ranks in a step."""
    counted = {}
    with processes("cpu", 1) as group:
        images = torch.randint(0, 256, (2, 3, given.size, given.size), dtype=torch.uint8)
        batch = Batch(images, torch.arange(2), torch.arange(2))
        for name in given.engines:
            engine = make_engine(name, given, group)
            engine.step(batch)
            group.barrier()
            before = loopback()
            group.barrier()
            for _ in range(given.steps):
                engine.step(batch)
            group.barrier()
            counted[name] = (loopback() - before) / given.steps
            group.barrier()
        if group.main:
            given.worker.write_text(json.dumps(counted))


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Bytes of all ranks in a step, for each engine."""
    own = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    isolated = subprocess.run([*own, "true"], capture_output=True).returncode == 0
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "bytes"
        options = ["--steps", str(given.steps), "--size", str(given.size), "--network", given.network]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={given.world_size}"]
        launcher += ["--master_addr=127.0.0.1", "--master_port=29511"] if isolated else ["--standalone"]
        command = [*launcher, "-m", "benchmarks.communication", "--worker", str(answer), *options]
        names = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*(own if isolated else []), *command, "--engines", *given.engines],
            env={**os.environ, **names},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        counted: dict[str, float] = json.loads(answer.read_text())
        return counted


def main() -> None:
    """Count, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given)
        return
    parameters, statistics = sizes(given.network)
    formula = sum(volume(parameters, statistics, given.world_size).values()) * given.world_size
    counted = measure(given)
    rows = [[engine, f"{count / 1e6:.2f}", f"{count / formula:.3f}"] for engine, count in counted.items()]
    print(f"{parameters:,} parameters, {statistics:,} running statistics, {given.world_size} ranks")
    print(f"formula: {formula / 1e6:.2f} MB a step from all ranks together")
    print(tabulate(rows, ["engine", "MB a step", "of the formula"]))
    settings = {key: value for key, value in vars(given).items() if key != "worker"}
    result: dict[str, Any] = {
        "ratios": {engine: count / formula for engine, count in counted.items()},
        "bytes": counted,
    }
    result |= {"formula": formula, "parameters": parameters, "statistics": statistics, "settings": settings}
    print(json.dumps({**result, "environment": environment()}))


if __name__ == "__main__":
    main()
