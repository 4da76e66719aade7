"""What GUARD costs beside adversarial training, in time and memory (the paper's Table 4).

    python -m benchmarks.overhead [--images 32] [--size 64] [--steps 1] [--rounds 5] [--device auto] [--threads 1]

A step is one forward and backward pass of the squeeze task. Every arm lives in a process of its own, so that its peak
memory is its own, and only one of them computes at a time. In each round every arm has its turn of ``--steps`` steps,
after two that warm up, so that a busy machine slows all of them. Seconds are medians over all steps; a ratio is taken
within each round and is the median over the rounds.

``none`` is a plain step, ``curvature`` is Eq. 11 by first-order passes (``regularizer.gradients=auto``), ``curvature,
functorch`` the same by double backward, ``adversarial`` trains on PGD-10 examples: the embedded adversarial training of
the paper's §3.2, as its Table 1 has it. ``loss_difference`` is the penalty of the released ImageNet code.

Memory on a CPU is told twice: the peak of what torch allocates in a step, above network and batch, and the peak of the
process's resident memory (VmHWM) over all its steps, above that of a process with the same network and batch that has
made none; that holds the libraries' scratch memory too, and what the system's allocator does not give back. On a GPU
there is torch.cuda.max_memory_allocated alone, network and batch included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.squeeze_step import make_case, peak_memory
from distill.provenance import environment

ARMS = ("none", "curvature", "curvature, functorch", "loss_difference", "gradient_norm", "adversarial")
IDLE = "idle"
"""A process with network and batch of a plain step, that makes none."""
WARM_UP = 2
PAPER = {
    "guard": {"seconds": 0.007, "sd": 2.661e-4, "mib": 3851},
    "adversarial": {"seconds": 2.198, "sd": 6.735e-4, "mib": 4211},
}
"""Table 4: batch 32 on one A100 80GB PCIe, mean of five iterations."""


def work(arm: str, given: argparse.Namespace, pipe: Connection) -> None:
    """A process of one arm: for every number received so many steps, whose seconds are sent; for None the peak MiB."""
    _prepare(given)
    step = make_case("none" if arm == IDLE else arm, "channels_last", given, given.size)
    while (count := pipe.recv()) is not None:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        pipe.send(seconds)
    pipe.send(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident_peak())


def _prepare(given: argparse.Namespace) -> None:
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(given.threads)


def resident_peak() -> float:
    """Peak resident memory of this process in MiB. ru_maxrss would hold that of the process that started it too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def measure(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each arm: seconds of a step, its ratios to a plain and to an adversarial step, and peak memory in MiB."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for arm in (IDLE, *ARMS):
        pipes[arm], end = context.Pipe()
        processes.append(context.Process(target=work, args=(arm, given, end), daemon=True))
        processes[-1].start()
        end.close()
    rounds: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for number in range(given.rounds + 1):
        for arm in ARMS:
            seconds = _ask(pipes[arm], arm, given.steps if number else WARM_UP)
            if number:
                rounds[arm].append(seconds)
    peaks = {arm: float(_ask(pipes[arm], arm, None)) for arm in pipes}
    for process in processes:
        process.join()
    figures = {arm: _figures(rounds, arm) for arm in ARMS}
    for arm, found in figures.items():
        if given.device == "cuda":
            found["peak_mib"] = peaks[arm]
            continue
        with context.Pool(1, _prepare, (given,)) as pool:
            found["peak_mib"], _ = pool.apply(peak_memory, ((arm, "channels_last"), given, given.size))
        found["resident_mib"] = peaks[arm] - peaks[IDLE]
    return figures


def _ask(pipe: Connection, arm: str, count: int | None) -> Any:
    try:
        pipe.send(count)
        return pipe.recv()
    except (EOFError, BrokenPipeError) as error:
        raise SystemExit(f"The process of {arm} has ended; what it said stands above.") from error


def _figures(rounds: dict[str, list[list[float]]], arm: str) -> dict[str, Any]:
    steps = [second for seconds in rounds[arm] for second in seconds]
    middles = {name: [statistics.median(seconds) for seconds in rounds[name]] for name in (arm, "none", "adversarial")}
    over = {
        name: statistics.median(mine / theirs for mine, theirs in zip(middles[arm], middles[name], strict=True))
        for name in ("none", "adversarial")
    }
    middle = statistics.median(steps)
    return {
        "seconds": middle,
        "deviation": statistics.median(abs(second - middle) for second in steps),
        "fastest": min(steps),
        "of_none": over["none"],
        "of_adversarial": over["adversarial"],
    }


def main() -> None:
    """Measure, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=32, help="batch size")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels; 224 is the paper's")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--steps", type=int, default=1, help="of each arm in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees; --device cpu measures without one")
    if min(given.images, given.steps, given.rounds, given.threads) < 1:
        parser.error("--images, --steps, --rounds and --threads must be at least 1")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    arms = measure(given)
    rows = [
        (
            arm,
            f"{case['seconds']:.4f} ± {case['deviation']:.4f}",
            f"{case['of_none']:.2f}",
            f"{case['of_adversarial']:.3f}",
            f"{case['peak_mib']:.0f}",
            f"{case['resident_mib']:.0f}" if "resident_mib" in case else "–",
        )
        for arm, case in arms.items()
    ]
    headers = [
        f"{given.size} px, batch {given.images}",
        "s per step",
        "of none",
        "of adversarial",
        "peak MiB",
        "resident",
    ]
    print(tabulate(rows, headers=headers, disable_numparse=True), end="\n\n")
    ratios = {arm: {"none": case["of_none"], "adversarial": case["of_adversarial"]} for arm, case in arms.items()}
    result = {"ratios": ratios, "arms": arms, "paper": PAPER, "settings": vars(given), "environment": environment()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
