"""Time and GPU hours of ImageNet-1K on A100s that nobody here has: a simulation, fed with what was measured on CPUs.

    python -m benchmarks.cluster_simulation [--gpus 1 8 64 256] [--ipc 10 50 100] [--preempted-every 2 8 24] [--untold]

What is measured and what is assumed stands in benchmarks/cluster/figures.py and docs/scaling.md. The figures are those
of the level ``middle``, with ``slow`` and ``fast`` as a range; with preemptions they are means over ``--seeds`` seeds.
Squeeze: 50 epochs, global batch 1024. Recover: units of 100 images, an array task for each GPU. Relabel and students:
300 epochs; a student trains on one GPU. Tests and attacks on the students are not in it. ``--untold`` preempts without
a signal: what a training did since its last checkpoint is lost, and a unit's worker counts as alive for its lease.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

from tabulate import tabulate

from benchmarks.cluster.events import Conditions, Outcome, shared, training
from benchmarks.cluster.figures import (
    BLOCK,
    CLASSES,
    GPUS_A_NODE,
    IMAGES,
    LEVELS,
    Assumed,
    Measured,
    measured,
    recover_unit,
    relabel_unit,
    squeeze_step,
    student_steps,
)
from distill.provenance import environment

BATCH, SQUEEZE_EPOCHS, EPOCHS, STUDENTS, CHECKPOINT_EVERY, LEASE = 1024, 50, 300, 3, 300.0, 120.0
PENALTIES = ("none", "float32", "tf32")
"""Precisions of the curvature penalty; the project allows float32 alone, for TF32's error is not measured."""
HOUR = 3600.0


def squeeze(gpus: int, penalty: str, given: Measured, assumed: Assumed, conditions: Conditions, seed: int) -> Outcome:
    """The teacher."""
    used = min(gpus, BATCH)
    seconds = (
        SQUEEZE_EPOCHS * math.ceil(IMAGES / BATCH) * sum(squeeze_step(used, BATCH, penalty, given, assumed).values())
    )
    nodes = math.ceil(used / GPUS_A_NODE)
    told = conditions.lease == 0
    return training(used, nodes, seconds, CHECKPOINT_EVERY, given.checkpoint[0], conditions, told=told, seed=seed)


def students(gpus: int, ipc: int, given: Measured, assumed: Assumed, conditions: Conditions, seed: int) -> Outcome:
    """Students of several seeds, each on one GPU; the stage ends with the last."""
    seconds = student_steps(ipc, EPOCHS, given, assumed)
    used = min(gpus, STUDENTS)
    step, told = (CHECKPOINT_EVERY, given.checkpoint[0]), conditions.lease == 0
    seeds = range(seed * STUDENTS, (seed + 1) * STUDENTS)
    runs = [training(1, 1, seconds, *step, conditions, told=told, seed=each) for each in seeds]
    lanes = [sum(run.seconds for run in runs[lane::used]) for lane in range(used)]
    return Outcome(max(lanes), sum(run.held for run in runs), 0.0, sum(run.preemptions for run in runs))


def stages(gpus: int, ipc: int, given: Measured, assumed: Assumed) -> dict[str, Callable[[Conditions, int], Outcome]]:
    """Every stage, as a function of the conditions and a seed."""

    def recover(iterations: int) -> Callable[[Conditions, int], Outcome]:
        unit, units = recover_unit(iterations, given, assumed), ipc * CLASSES // BLOCK
        return lambda conditions, seed: shared(gpus, units, unit, conditions, seed)

    def teacher(penalty: str) -> Callable[[Conditions, int], Outcome]:
        return lambda conditions, seed: squeeze(gpus, penalty, given, assumed, conditions, seed)

    unit = relabel_unit(ipc, given, assumed)
    return {
        **{f"squeeze, {'no penalty' if name == 'none' else f'penalty {name}'}": teacher(name) for name in PENALTIES},
        "recover 2000": recover(2000),
        "recover 4000": recover(4000),
        "relabel": lambda conditions, seed: shared(gpus, EPOCHS, unit, conditions, seed),
        f"{STUDENTS} students": lambda conditions, seed: students(gpus, ipc, given, assumed, conditions, seed),
    }


def simulate(stage: Callable[[Conditions, int], Outcome], conditions: Conditions, seeds: int) -> dict[str, float]:
    """Means over seeds, in hours."""
    outcomes = [stage(conditions, seed) for seed in range(seeds)]
    return {
        "hours": statistics.mean(each.seconds for each in outcomes) / HOUR,
        "gpu_hours": statistics.mean(each.held for each in outcomes) / HOUR,
        "lost_gpu_hours": statistics.mean(each.lost for each in outcomes) / HOUR,
        "preemptions": statistics.mean(each.preemptions for each in outcomes),
    }


def predict(parsed: argparse.Namespace, given: Measured) -> list[dict[str, Any]]:
    """Every case: GPUs, IPC, stage, level and preemption."""
    found: list[dict[str, Any]] = []
    for level, assumed in LEVELS.items():
        for every in [math.inf, *parsed.preempted_every] if level == "middle" else [math.inf]:
            lease = LEASE if parsed.untold else 0.0
            conditions = Conditions(every * HOUR, 120.0, assumed.start, lease, assumed.spread)
            for gpus in parsed.gpus:
                for ipc in parsed.ipc:
                    for name, stage in stages(gpus, ipc, given, assumed).items():
                        if name.startswith("squeeze") and ipc != parsed.ipc[0]:
                            # It does not know the IPC.
                            continue
                        answer = simulate(stage, conditions, parsed.seeds if assumed.spread or every < math.inf else 1)
                        case = {"stage": name, "gpus": gpus, "ipc": 0 if name.startswith("squeeze") else ipc}
                        every_hours = None if math.isinf(every) else every
                        found.append({**case, "level": level, "preempted_every_hours": every_hours, **answer})
    return found


def limits(given: Measured) -> list[list[Any]]:
    """Where each stage stops scaling: the most GPUs, a power of two, that work at half of one GPU's pace or better."""
    assumed = LEVELS["middle"]
    rows: list[list[Any]] = []
    calm = Conditions(start=assumed.start, spread=assumed.spread)
    for ipc in (10, 50, 100):
        for name, stage in stages(1, ipc, given, assumed).items():
            if name.startswith("squeeze") and ipc != 10:
                continue
            alone, best = stage(calm, 0).seconds, 1
            for exponent in range(1, 13):
                gpus = 2**exponent
                seconds = stages(gpus, ipc, given, assumed)[name](calm, 0).seconds
                if alone / seconds >= gpus / 2:
                    best = gpus
            fastest = min(stages(2**e, ipc, given, assumed)[name](calm, 0).seconds for e in range(13)) / HOUR
            rows.append([name, "-" if name.startswith("squeeze") else ipc, best, time(fastest)])
    return rows


def time(hours: float) -> str:
    """For people."""
    if hours < 1.5:
        return f"{60 * hours:.1f} min" if hours < 1 / 6 else f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:.0f} h"


def show(cases: list[dict[str, Any]], parsed: argparse.Namespace) -> None:
    """Two tables: without preemption, and what preemptions add."""
    keyed = {(c["stage"], c["ipc"], c["gpus"], c["level"], c["preempted_every_hours"]): c for c in cases}
    stage_keys = list(dict.fromkeys((c["stage"], c["ipc"]) for c in cases))
    rows, more = [], []
    for stage, ipc in stage_keys:
        row = [stage, ipc or "-"]
        for gpus in parsed.gpus:
            middle, slow, fast = (keyed[stage, ipc, gpus, level, None] for level in ("middle", "slow", "fast"))
            row.append(
                f"{time(middle['hours'])} ({time(fast['hours'])} - {time(slow['hours'])}), {middle['gpu_hours']:.3g}"
            )
        rows.append(row)
        row = [stage, ipc or "-"]
        for gpus in parsed.gpus:
            calm = keyed[stage, ipc, gpus, "middle", None]
            texts = []
            for every in parsed.preempted_every:
                case = keyed[stage, ipc, gpus, "middle", every]
                texts.append(f"{case['hours'] / calm['hours']:.2f}")
            row.append(" ".join(texts))
        more.append(row)
    heads = [f"{gpus} GPUs" for gpus in parsed.gpus]
    print("Time at the middle level (fast - slow), GPU hours at the middle one:")
    print(tabulate(rows, ["stage", "ipc", *heads]))
    every = ", ".join(f"{each:g}" for each in parsed.preempted_every)
    print(f"\nTime with a preemption every {every} h (a worker, or a node of the squeeze), of the time without:")
    print(tabulate(more, ["stage", "ipc", *heads]))


def show_steps(parsed: argparse.Namespace, given: Measured) -> dict[str, dict[str, float]]:
    """What a step of the squeeze goes into."""
    found, rows = {}, []
    for penalty in PENALTIES:
        for gpus in parsed.gpus:
            parts = squeeze_step(gpus, BATCH, penalty, given, LEVELS["middle"])
            found[f"{penalty} {gpus}"] = parts
            images = BATCH / sum(parts.values())
            need = images / gpus / given.loading
            milliseconds = [f"{1000 * part:.2f}" for part in parts.values()]
            rows.append([penalty, gpus, math.ceil(BATCH / gpus), *milliseconds, f"{images:.0f}", f"{need:.1f}"])
    head = [
        "penalty",
        "GPUs",
        "images a GPU",
        "compute, ms",
        "slowest rank",
        "communication",
        "images/s",
        "cores a GPU",
    ]
    print("\nA step of the squeeze, middle level; cores that read images for a GPU:")
    print(tabulate(rows, head))
    return found


def main() -> None:
    """Simulate, print tables, then one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--ipc", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--preempted-every", type=float, nargs="+", default=[2.0, 8.0, 24.0], help="hours")
    parser.add_argument("--untold", action="store_true")
    parser.add_argument("--seeds", type=int, default=9)
    parsed = parser.parse_args()
    given = measured()
    cases = predict(parsed, given)
    show(cases, parsed)
    steps, ends = show_steps(parsed, given), limits(given)
    print("\nWhere a stage stops scaling, middle level, without preemption:")
    print(tabulate(ends, ["stage", "ipc", "GPUs at half of one's pace", "shortest time on up to 4096"]))
    result = {"cases": cases, "squeeze_step": steps, "limits": ends, "measured": vars(given), "settings": vars(parsed)}
    result["assumed"] = {name: vars(level) for name, level in LEVELS.items()}
    print(json.dumps({**result, "environment": environment()}))


if __name__ == "__main__":
    main()
