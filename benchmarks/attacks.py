"""PGD-100 on a student: our runner against torchattacks over every image, as the released evaluation runs it.

    python -m benchmarks.attacks [--source cifar10.zip] [--data-root FOLDER] [--run RUN --network seed0]
                                 [--images 256] [--batch 128] [--epsilon 1] [--rounds 3] [--threads 1]

Theirs: ``torchattacks.PGD(model, eps, alpha=eps/4, steps=100)`` batch by batch on all images, right or not, and one
more pass to count. Ours: ``run_attack`` on the same images in batches of the same size; the pass over the clean images
that tells which are right belongs to its time. It is measured with its usual forward passes of 32 images and with
others. Theirs runs in the memory format that a short trial finds faster; ours is in channels_last.

Rounds alternate between the cases in one process, so that a busy machine slows all of them; figures are medians.
Seconds are those of the clock, and of the processor, which other programs disturb less.

Where the time goes is told by passes: theirs makes 100 forward and backward passes for each image. Ours makes as many
only for images that are right when clean, and only until they are broken or go round in a circle (``floor``); passes
that are filled up to their size compute more rows than that (``rows``).

The student is that of a run, or a ResNet-10 at half width that is trained here on CIFAR-10 with hard labels until it
gets 60 % of the test images right; --weights FILE keeps it for the next time.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchattacks
from tabulate import tabulate
from torch import Tensor, nn

from data_prep import prepare
from distill.compose import compose
from distill.config import Config
from distill.data.batch import Batch
from distill.data.catalogue import PreparedSet
from distill.data.loaders import read_images, samples, training_loader
from distill.files import load_tensors, save_tensors
from distill.models import Normalize, build_network, load_teacher
from distill.provenance import environment, processor
from distill.robustness.runner import run_attack, top_accuracy
from distill.robustness.sanity import subset
from distill.robustness.suite import plan
from distill.stages.spectrum import read_config
from distill.stages.student import weights_file

STEPS, WANTED = 100, 0.6
USUAL = 32
"""Images of a forward pass, as ``attacks.forward_batch`` has it."""
LIMIT = 2.0
"""How many times faster the runner is to be."""
BASE = "torchattacks"


@dataclass(frozen=True)
class Run:
    """One attack on all images: clock and processor seconds, and the share of images that it leaves standing."""

    seconds: float
    cpu: float
    accuracy: float


def trained(config: Config, prepared: PreparedSet, test: Batch, kept: Path | None) -> nn.Module:
    """A student that takes images in [0, 1], trained on real images with hard labels."""
    dataset = config.dataset
    network = build_network(config.student, dataset.num_classes, dataset.image_size, 0, "benchmark")
    model = nn.Sequential(Normalize(dataset.mean, dataset.std), network).to(memory_format=torch.channels_last)
    if kept and kept.is_file():
        network.load_state_dict(load_tensors(kept))
        return model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = training_loader(config, prepared)
    for epoch in range(40):
        model.train()
        loader.set_epoch(epoch)
        for batch in loader:
            images = (batch.images / 255).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = top_accuracy(model, [test], forward_batch=128, quiet=True).as_json()["top1"]
        print(f"epoch {epoch + 1}: {100 * accuracy:.1f} % of {len(test)} test images", flush=True)
        if accuracy >= WANTED:
            break
    if kept:
        save_tensors(kept, network.state_dict())
    return model.eval()


def of_run(config: Config, run: Path, name: str) -> nn.Module:
    """The teacher of a run, or the student ``seed0``, with the normalisation in front."""
    normalize = Normalize(config.dataset.mean, config.dataset.std)
    if name == "teacher":
        return nn.Sequential(normalize, load_teacher(run / "teacher"))
    network = build_network(config.student, config.dataset.num_classes, config.dataset.image_size, 0, "benchmark")
    network.load_state_dict(load_tensors(run / "student" / weights_file(int(name.removeprefix("seed")))))
    return nn.Sequential(normalize, network).eval()


def timed(attack: Callable[[], Tensor]) -> Run:
    """Seconds of one attack, which gives bool (N,): the images that are still right."""
    clock, cpu = time.perf_counter(), time.process_time()
    robust = attack()
    return Run(time.perf_counter() - clock, time.process_time() - cpu, robust.double().mean().item())


def released(
    model: nn.Module, batch: Batch, size: int, epsilon: float, memory_format: torch.memory_format, steps: int
) -> Tensor:
    """torchattacks' own PGD on every image, and one more pass to count."""
    radius = epsilon / 255
    attack = torchattacks.PGD(model, eps=radius, alpha=radius / 4, steps=steps, random_start=True)
    robust = []
    for images, labels in zip(batch.images.split(size), batch.labels.split(size), strict=True):
        floats = (images / 255).contiguous(memory_format=memory_format)
        adversarial = attack(floats, labels)
        with torch.no_grad():
            robust.append(model(adversarial).argmax(1) == labels)
    return torch.cat(robust)


def ours(model: nn.Module, batch: Batch, size: int, forward_batch: int, epsilon: float) -> tuple[Tensor, float]:
    """The runner from clean images to outcomes; and passes for each attacked image."""
    right = top_accuracy(model, [batch], forward_batch=forward_batch, quiet=True).correct
    (planned,) = plan({"pgd100": {"attack": "PGD", "steps": STEPS, "alpha_ratio": 0.25}}, [epsilon])
    result = run_attack(
        *(model, batch, right, planned), num_classes=10, batch_size=size, forward_batch=forward_batch, quiet=True
    )
    return result.robust, result.forward / len(batch)


def rows_computed(model: nn.Module, call: Callable[[], Any], count: int) -> tuple[float, Any]:
    """Rows that the model computes in forward passes, for each of the images, and what the call gives.

    They are counted at the normalisation, the first part of the model: a hook on the whole would keep the runner from
    folding batch norm.
    """
    counted = []
    (first, *_) = model.children()
    handle = first.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))
    try:
        result = call()
    finally:
        handle.remove()
    return sum(counted) / count, result


def measure(model: nn.Module, batch: Batch, given: argparse.Namespace) -> dict[str, Any]:
    """Medians of each case, and how much work each does."""
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    models = {name: copy.deepcopy(model).to(memory_format=each) for name, each in formats.items()}
    first = Batch(batch.images[: given.batch], batch.labels[: given.batch], batch.indices[: given.batch])
    trials = {
        name: min(timed(functools.partial(released, models[name], first, given.batch, 1.0, each, 5)).cpu for _ in "123")
        for name, each in formats.items()
    }
    best = min(trials, key=trials.__getitem__)
    cases: dict[str, Callable[[], Tensor]] = {
        f"{BASE}, {best}": functools.partial(
            released, models[best], batch, given.batch, given.epsilon, formats[best], STEPS
        )
    }
    for size in dict.fromkeys((USUAL, *given.passes)):
        cases[f"runner, passes of {size}"] = functools.partial(
            lambda size: ours(models["channels_last"], batch, given.batch, size, given.epsilon)[0], size
        )
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for number in range(given.rounds):
        for name, case in cases.items():
            runs[name].append(timed(case))
            print(f"round {number + 1}: {name}: {runs[name][-1].seconds:.1f} s", flush=True)
    passes, rows = dict.fromkeys(cases, STEPS + 1.0), dict.fromkeys(cases, STEPS + 1.0)
    for name in cases:
        if not name.startswith(BASE):
            size, model = int(name.split()[-1]), models["channels_last"]
            again = functools.partial(ours, model, batch, given.batch, size, given.epsilon)
            rows[name], (_, passes[name]) = rows_computed(model, again, len(batch))
    return {
        name: {
            "seconds": statistics.median(run.seconds for run in each),
            "cpu_seconds": statistics.median(run.cpu for run in each),
            "accuracy": [run.accuracy for run in each],
            "passes": passes[name],
            "rows": rows[name],
        }
        for name, each in runs.items()
    }


def main() -> None:
    """Make or load the student, measure, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", default="cifar10.zip", help="an archive of CIFAR-10 in ImageFolder layout")
    parser.add_argument("--data-root", help="where the data set is or is to be prepared (default: a temporary folder)")
    parser.add_argument("--run", type=Path, help="a finished run, whose network and data set are taken")
    parser.add_argument("--network", default="seed0", help="of the run: teacher, seed0, ...")
    parser.add_argument("--weights", type=Path, help="a file for the student that is trained here; read if it exists")
    parser.add_argument("--per-class", type=int, default=1500, help="training images of each class")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--passes", type=int, nargs="*", default=[16], help="other sizes of a forward pass than 32")
    parser.add_argument("--epsilon", type=float, default=1.0, help="in 1/255")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="0 leaves it to torch")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        model, batch, trained_to = load(given, given.data_root or folder)
        found = measure(model, batch, given)
    clean = top_accuracy(model, [batch], quiet=True).as_json()["top1"]
    base = min((name for name in found if name.startswith(BASE)), key=lambda name: found[name]["seconds"])
    table = []
    for name, case in found.items():
        case["images_per_second"] = len(batch) / case["seconds"]
        case["faster"] = found[base]["seconds"] / case["seconds"]
        case["faster_cpu"] = found[base]["cpu_seconds"] / case["cpu_seconds"]
        table.append(
            (
                name,
                *(f"{case[key]:.2f}" for key in ("seconds", "cpu_seconds", "images_per_second")),
                *(f"{case[key]:.2f}" for key in ("faster", "faster_cpu")),
                *(f"{case[key]:.1f}" for key in ("passes", "rows")),
                " ".join(f"{100 * each:.2f}" for each in sorted(set(case["accuracy"]))),
            )
        )
    headers = ["PGD-100", "s", "CPU s", "images/s", "times", "by CPU", "passes", "rows", "robust accuracy %"]
    print(f"\n{100 * clean:.1f} % of {len(batch)} images are right when clean; radius {given.epsilon:g}/255\n")
    print(tabulate(table, headers=headers, disable_numparse=True), end="\n\n")
    default = found[f"runner, passes of {USUAL}"]
    # Theirs starts elsewhere in each round; an image or two near the boundary may fall otherwise.
    difference = default["accuracy"][0] - statistics.median(found[base]["accuracy"])
    facts = {
        "clean": clean,
        "student_top1": trained_to,
        "ratio": default["faster"],
        "ratio_cpu": default["faster_cpu"],
        "limit": LIMIT,
        "accuracy_difference": difference,
        "floor": (STEPS + 1) / default["passes"],
    }
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    settings["threads"] = torch.get_num_threads()
    print(
        json.dumps(
            {**facts, "cases": found, "settings": settings, "processor": processor(), "environment": environment()}
        )
    )


def load(given: argparse.Namespace, data_root: str) -> tuple[nn.Module, Batch, float]:
    """The network, the images to attack, and the network's accuracy on 1,000 test images."""
    if given.run:
        config = read_config(given.run)
        config = replace(config, data_root=data_root if given.data_root else config.data_root)
        prepared = PreparedSet.open(Path(config.data_root) / config.dataset.name)
    else:
        options = ["experiment=cifar10_cpu", f"dataset.source={given.source}", f"data_root={data_root}"]
        options += [f"dataset.max_per_class={given.per_class}", "squeeze.batch_size=128"]
        config = compose(options)
        prepared = prepare(config)
    tested = samples(config, prepared, "test").choose(1000, config.seed)
    batch = read_images(config, prepared, tested, 250)
    model = of_run(config, given.run, given.network) if given.run else trained(config, prepared, batch, given.weights)
    accuracy = top_accuracy(model, [batch], quiet=True).as_json()["top1"]
    # Every n-th, so that each class has its share.
    chosen = torch.from_numpy(subset(len(batch), given.images))
    return model, Batch(batch.images[chosen], batch.labels[chosen], batch.indices[chosen]), accuracy


if __name__ == "__main__":
    main()
