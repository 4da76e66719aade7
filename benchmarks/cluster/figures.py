"""What the simulator is fed with: what was measured or counted here, and what is assumed about A100s.

Nothing of this project has run on a GPU. Whatever is in ``Assumed`` is an assumption with its source, at three levels;
the rest was measured on CPUs or counted, and stands in docs/results/.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cluster.events import slowest

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
IMAGES, CLASSES, BLOCK = 1_281_167, 1000, 100
"""ImageNet-1K: training images, classes, classes of a unit of recovery."""
PEAK = {"bf16": 312e12, "tf32": 156e12, "float32": 19.5e12}
"""Dense operations a second of an A100 (NVIDIA's data sheet). IEEE float32 has no tensor cores there."""
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Assumed:
    """Assumptions about an A100 node.

    Attributes:
        tensor: share of the peak that ResNet18 reaches in bf16 and TF32. Source of the middle: ffcv-imagenet's README,
            ResNet-18, 88 epochs in 187.3 minutes on one A100 at 160 and 192 pixels, which is 20 % of the bf16 peak.
        vector: the same in IEEE float32. No source.
        launch: seconds that the host needs for an operation of PyTorch, when the GPU is not the slower. No source.
        node_bandwidth: bytes a second that a node sends: 100, 400 (AWS p4d) and 1600 Gbit/s (DGX A100).
        gpu_bandwidth: bytes a second that a GPU sends within its node, of 300 GB/s that NVLink has each way.
        latency: seconds of one hop of a collective.
        spread: see ``Conditions``; of a unit's time and of a rank's step.
        start: seconds from the start of a process to its first step, compilation included.
    """

    tensor: float
    vector: float
    launch: float
    node_bandwidth: float
    gpu_bandwidth: float
    latency: float
    spread: float
    start: float


LEVELS = {
    "slow": Assumed(0.10, 0.40, 10e-6, 12.5e9, 100e9, 40e-6, 0.15, 120.0),
    "middle": Assumed(0.20, 0.55, 6e-6, 50e9, 150e9, 20e-6, 0.08, 60.0),
    "fast": Assumed(0.30, 0.70, 4e-6, 200e9, 220e9, 10e-6, 0.03, 40.0),
}


@dataclass(frozen=True)
class Measured:
    """What was measured or counted.

    Attributes:
        forward: floating-point operations of a forward pass of ResNet18 on one image of 224 pixels, counted by torch.
        penalty: a step with the curvature penalty in plain steps, both in float32 (squeeze.json).
        recover: an iteration of recovery, of the bare forward pass and input gradient, compiled bf16 (recovery.json).
        relabel: labels of the bare teacher's time, the same.
        student: handling's share of a student's epoch (recovery.json).
        operations: of PyTorch in a step, by what the step is; counted.
        parameters: of ResNet18.
        statistics: running means and variances of it.
        checkpoint: seconds to write one, and its bytes (scaling.json).
        loading: images a second that one CPU core reads and crops from .beton files (loaders.json).
    """

    forward: float
    penalty: float
    recover: float
    relabel: float
    student: float
    operations: dict[str, int]
    parameters: int
    statistics: int
    checkpoint: tuple[float, int]
    loading: float


def measured() -> Measured:
    """Read the figures from docs/results/."""
    squeeze, recovery, loaders, scaling = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("squeeze", "recovery", "loaders", "scaling")
    )
    step = scaling["step"]
    return Measured(
        forward=step["forward"],
        penalty=squeeze["squeeze_step"]["ratios"]["64"]["curvature"],
        recover=recovery["recover_iteration"]["floors"]["compiled bf16"],
        relabel=recovery["relabel"]["ratios"]["224"]["bf16, compiled"]["of_floor"],
        student=recovery["student_epoch"]["ratios"]["64"]["ours, float16"],
        operations=step["operations"],
        parameters=step["parameters"],
        statistics=step["statistics"],
        checkpoint=(step["checkpoint_seconds"], step["checkpoint_bytes"]),
        loading=loaders["figures"]["ffcv jpg"]["images_per_second"] / loaders["settings"]["workers"],
    )


def compute(operations: int, work: dict[str, float], assumed: Assumed) -> float:
    """Seconds of a step on one GPU: as long as its arithmetic takes, or as the host needs to ask for it.

    Args:
        operations: of PyTorch.
        work: precision → floating-point operations.
    """
    shares = {"bf16": assumed.tensor, "tf32": assumed.tensor, "float32": assumed.vector}
    arithmetic = sum(count / (PEAK[name] * shares[name]) for name, count in work.items())
    return max(arithmetic, operations * assumed.launch)


def exchange(volume: float, gpus: int, assumed: Assumed) -> float:
    """Seconds of an all-reduce: a ring within nodes and one over them, nothing of it hidden behind arithmetic."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / GPUS_A_NODE)
    inside = min(gpus, GPUS_A_NODE)
    seconds = 2 * (inside - 1) / inside * volume / assumed.gpu_bandwidth
    if nodes > 1:
        seconds += 2 * (nodes - 1) / nodes * volume / assumed.node_bandwidth
    return seconds + 2 * math.ceil(math.log2(gpus)) * assumed.latency


def squeeze_step(gpus: int, batch: int, penalty: str, given: Measured, assumed: Assumed) -> dict[str, float]:
    """Seconds of a step of the squeeze, by what they go into.

    Args:
        batch: images over all GPUs; each has at least one.
        penalty: ``none``, or the precision that the curvature penalty computes in.
    """
    images = math.ceil(batch / gpus)
    work = {"tf32": images * 3 * given.forward, "float32": 0.0}
    if penalty != "none":
        work[penalty] += images * 3 * given.forward * (given.penalty - 1)
    arithmetic = compute(given.operations["plain" if penalty == "none" else "curvature"], work, assumed)
    # Gradients; means of the terms; running statistics, before a penalty too. What ranks agree on travels meanwhile.
    exchanged = exchange(4 * given.parameters, gpus, assumed) + exchange(64, gpus, assumed)
    exchanged += (1 if penalty == "none" else 2) * exchange(4 * given.statistics, gpus, assumed)
    waited = arithmetic * (slowest(gpus, assumed.spread) - 1)
    return {"compute": arithmetic, "slowest rank": waited, "communication": exchanged}


def recover_unit(iterations: int, given: Measured, assumed: Assumed) -> float:
    """Seconds of a unit: 100 images, a forward pass and an input gradient in compiled bf16 in each iteration."""
    work = {"bf16": BLOCK * 2 * given.forward * given.recover}
    return iterations * compute(given.operations["recover"], work, assumed)


def relabel_unit(ipc: int, given: Measured, assumed: Assumed) -> float:
    """Seconds of a unit: one epoch's views of all distilled images in batches of 100, in compiled bf16."""
    work = {"bf16": 100 * given.forward * given.relabel}
    return ipc * CLASSES / 100 * compute(given.operations["relabel"], work, assumed)


def student_steps(ipc: int, epochs: int, given: Measured, assumed: Assumed) -> float:
    """Seconds of a student's training in batches of 100: TF32, on one GPU."""
    step = compute(given.operations["plain"], {"tf32": 100 * 3 * given.forward}, assumed)
    return epochs * ipc * CLASSES / 100 * step / (1 - given.student)
