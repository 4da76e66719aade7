"""Accuracy of a network under attack: which images survive, and exactly what attacked them (SPEC §3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.errors import DataError, GuardError, NonFiniteError
from distill.progress import Progress
from distill.randomness import seeded
from distill.robustness.attacks import PlannedAttack, build, is_linf
from distill.robustness.lending import lent
from distill.robustness.results import AttackReport, AttackResult, CleanResult
from distill.robustness.suite import plan, shipped_suite

TOLERANCE = 1e-6
"""How far outside the ε-ball rounding may carry a pixel in [0, 1]."""


def attack_accuracy(
    model: nn.Module,
    loader: Iterable[Batch],
    suite: str | Mapping[str, Any] = "quick",
    *,
    epsilon: Sequence[float] = (1.0,),
    num_classes: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
    quiet: bool = False,
) -> AttackReport:
    """Accuracy of a model on real images, clean and under each attack at each radius.

    Outcomes are a function of the images, the model, the suite, ``seed`` and ``batch_size``; the loader's order and
    batch size do not matter. All images are held in memory as bytes.

    Args:
        model: takes float images (N, 3, H, W) in [0, 1], normalises them itself, gives logits.
        loader: gives ``Batch``es of uint8 images.
        suite: a name in ``configs/attacks``, a suite (name → {attack: class of torchattacks, arguments}), or one attack
            ({attack: class, arguments}).
        epsilon: L∞ radii in units of 1/255.
        num_classes: None takes the number of logits.
        batch_size: images attacked together.
        quiet: show no progress.

    Raises:
        ConfigError: the suite names an unknown class or argument.
        NonFiniteError, GuardError: see ``run_attack``.
    """
    if isinstance(suite, str):
        suite = shipped_suite(suite)
    elif isinstance(suite.get("attack"), str):
        suite = {suite["attack"].lower(): suite}
    planned = plan(suite, epsilon)
    batches = [batch.to("cpu") for batch in loader]
    if not batches:
        raise DataError("The loader gave no image to attack.")
    columns = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "indices"))
    images, labels, indices = columns
    order = indices.argsort(stable=True)
    images, labels, indices = images[order], labels[order], indices[order]
    blocks = [Batch(*part) for part in zip(*(t.split(batch_size) for t in (images, labels, indices)), strict=True)]
    clean = top_accuracy(model, blocks, quiet=quiet)

    def attacked(one: PlannedAttack) -> AttackResult:
        classes = num_classes or clean.num_classes
        known = (model, images, labels, clean.correct, one)
        return run_attack(*known, num_classes=classes, seed=seed, batch_size=batch_size, quiet=quiet)

    return AttackReport(clean, [attacked(one) for one in planned])


def top_accuracy(model: nn.Module, loader: Iterable[Batch], *, quiet: bool = False) -> CleanResult:
    """Top-1 and top-5 answers on images that nobody attacked.

    Args:
        model: takes float images (N, 3, H, W) in [0, 1], gives logits.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
        DataError: there is no image.
    """
    correct, in_top5, indices = [], [], []
    total = len(loader) if isinstance(loader, Sized) else 0
    with lent(model) as (network, device), torch.no_grad(), Progress(total, "test", "batch", quiet=quiet) as progress:
        for batch in loader:
            batch = batch.to(device)
            logits = _answers(network, batch.images / 255, "clean images")
            best = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
            correct.append((logits.argmax(1) == batch.labels).cpu())
            in_top5.append(best.any(1).cpu())
            indices.append(batch.indices.cpu())
            progress.update()
    if not correct:
        raise DataError("The loader gave no image to test on.")
    return CleanResult(torch.cat(correct), torch.cat(in_top5), torch.cat(indices), logits.shape[1])


def run_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    clean_correct: Tensor,
    planned: PlannedAttack,
    *,
    num_classes: int,
    seed: int = 0,
    batch_size: int = 100,
    quiet: bool = False,
) -> AttackResult:
    """Run one attack at one radius.

    The images are cut into blocks of ``batch_size``, and the global random generators are seeded for each block and put
    back afterwards. An image that is wrong when clean is not robust and is never attacked.

    Args:
        model: takes float images (N, 3, H, W) in [0, 1], gives logits. It works in eval mode and without gradients of
            its parameters; both are put back.
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        clean_correct: bool (N,), which images are right when clean.

    Raises:
        NonFiniteError: the attack made a NaN, or the model answers one.
        GuardError: an image left [0, 1] or the ε-ball of an L∞ attack.
    """
    robust = torch.zeros(len(labels), dtype=torch.bool)
    images, labels, right = images.cpu(), labels.cpu(), clean_correct.cpu()
    with lent(model) as (network, device), Progress(int(right.sum()), planned.label, "image", quiet=quiet) as progress:
        attack, specification = build(planned, network, num_classes, seed)
        radius = specification["arguments"]["eps"] if is_linf(planned.attack, specification["arguments"]) else None
        for block, start in enumerate(range(0, len(labels), batch_size)):
            end = min(start + batch_size, len(labels))
            chosen = start + right[start:end].nonzero().flatten()
            if not len(chosen):
                continue
            clean, truth = images[chosen].to(device) / 255, labels[chosen].to(device)
            with seeded(seed, f"attack:{planned.label}", block), torch.enable_grad():
                adversarial = attack(clean, truth).detach()
            _check_images(adversarial, clean, radius, planned.label)
            with torch.no_grad():
                answers = _answers(network, adversarial, f"images of {planned.label}").argmax(1)
            robust[chosen] = (answers == truth).cpu()
            progress.update(len(chosen), accuracy=f"{int(robust.sum()) / end:.3f}")
    specification |= {"seed": seed, "batch_size": batch_size}
    return AttackResult(planned.name, planned.epsilon, robust, int(right.sum()) / len(right), specification)


def _answers(network: nn.Module, images: Tensor, what: str) -> Tensor:
    logits: Tensor = network(images)
    if not logits.isfinite().all():
        raise NonFiniteError(f"The network answers NaN or infinite logits on {what}; its weights are broken.")
    return logits


def _check_images(adversarial: Tensor, clean: Tensor, radius: float | None, label: str) -> None:
    if not adversarial.isfinite().all():
        raise NonFiniteError(
            f"The attack {label} made NaN pixels, as some do where a gradient vanishes; leave it out of attacks.suite."
        )
    if adversarial.min() < -TOLERANCE or adversarial.max() > 1 + TOLERANCE:
        raise GuardError(f"The attack {label} left the pixel range [0, 1]; leave it out of attacks.suite.")
    if radius is not None and (distance := float((adversarial - clean).abs().max())) > radius + TOLERANCE:
        raise GuardError(
            f"The attack {label} moved a pixel by {255 * distance:.4f}/255, beyond its radius of {255 * radius:g}/255; "
            "leave it out of attacks.suite."
        )
