"""Accuracy of a network under attack: which images survive, and exactly what attacked them (SPEC §3).

What happens to an image is a function of the image, its index, the model, the attack and the seed alone: not of the
batch that it is attacked in, the order of the images or the number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.errors import DataError, GuardError, NonFiniteError
from distill.progress import Progress
from distill.randomness import seeded
from distill.robustness.attacks import BuiltAttack, PlannedAttack, Stage, build
from distill.robustness.drawing import PerImage
from distill.robustness.lending import NothingLeft, Watched, answers, lent
from distill.robustness.results import AttackReport, AttackResult, CleanResult
from distill.robustness.suite import plan, shipped_suite
from distill.robustness.threat import TOLERANCE, Threat


def attack_accuracy(
    model: nn.Module,
    loader: Iterable[Batch],
    suite: str | Mapping[str, Any] = "quick",
    *,
    epsilon: Sequence[float] = (1.0,),
    norm: str = "Linf",
    num_classes: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    forward_batch: int = 32,
    quiet: bool = False,
) -> AttackReport:
    """Accuracy of a model on real images, clean and under each attack at each radius.

    Outcomes are a function of the images and their indices, the model, the suite, ``seed`` and ``forward_batch``; the
    loader's order and both batch sizes do not matter. All images are held in memory as bytes.

    Args:
        model: takes float images (N, 3, H, W) in [0, 1], normalises them itself, gives logits.
        loader: gives ``Batch``es of uint8 images.
        suite: a name in ``configs/attacks``, a suite (name → {attack: class of torchattacks, arguments}), or one attack
            ({attack: class, arguments}).
        epsilon: radii, in units of 1/255 for L∞ and of [0, 1] pixels for L2.
        norm: ``Linf`` or ``L2``.
        num_classes: None takes the number of logits.
        batch_size: images attacked together.
        forward_batch: images of a forward pass of the model.
        quiet: show no progress.

    Raises:
        ConfigError: the suite names an unknown class or argument.
        NonFiniteError, GuardError: see ``run_attack``.
    """
    if isinstance(suite, str):
        suite = shipped_suite(suite)
    elif isinstance(suite.get("attack"), str):
        suite = {suite["attack"].lower(): suite}
    planned = plan(suite, epsilon, norm)
    batches = [batch.to("cpu") for batch in loader]
    if not batches:
        raise DataError("The loader gave no image to attack.")
    columns = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "indices"))
    images, labels, indices = columns
    order = indices.argsort(stable=True)
    batch = Batch(images[order], labels[order], indices[order])
    clean = top_accuracy(model, [batch], forward_batch=forward_batch, quiet=quiet)

    def attacked(one: PlannedAttack) -> AttackResult:
        classes = num_classes or clean.num_classes
        return run_attack(
            *(model, batch, clean.correct, one),
            num_classes=classes,
            seed=seed,
            batch_size=batch_size,
            forward_batch=forward_batch,
            quiet=quiet,
        )

    return AttackReport(clean, [attacked(one) for one in planned])


def top_accuracy(
    model: nn.Module, loader: Iterable[Batch], *, forward_batch: int = 32, quiet: bool = False
) -> CleanResult:
    """Top-1 and top-5 answers on images that nobody attacked.

    Args:
        model: takes float images (N, 3, H, W) in [0, 1], gives logits.
        forward_batch: images of a forward pass; the answer on an image does not depend on the others.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
        DataError: there is no image.
    """
    correct, in_top5, indices = [], [], []
    total = len(loader) if isinstance(loader, Sized) else 0
    with lent(model, forward_batch) as network, Progress(total, "test", "batch", quiet=quiet) as progress:
        for batch in loader:
            batch = batch.to(network.device)
            # One part at a time: as floats, a whole test set would not fit.
            parts = [answers(network, part / 255, "clean images") for part in batch.images.split(forward_batch)]
            logits = torch.cat(parts)
            # Of equal logits the first counts, as for argmax; topk leaves open which it takes.
            best = logits.sort(dim=1, descending=True, stable=True).indices[:, :5] == batch.labels[:, None]
            correct.append((logits.argmax(1) == batch.labels).cpu())
            in_top5.append(best.any(1).cpu())
            indices.append(batch.indices.cpu())
            progress.update()
    if not correct:
        raise DataError("The loader gave no image to test on.")
    return CleanResult(torch.cat(correct), torch.cat(in_top5), torch.cat(indices), logits.shape[1])


def run_attack(
    model: nn.Module,
    batch: Batch,
    clean_correct: Tensor,
    planned: PlannedAttack,
    *,
    num_classes: int,
    seed: int = 0,
    batch_size: int = 256,
    forward_batch: int = 32,
    source: nn.Module | None = None,
    quiet: bool = False,
) -> AttackResult:
    """Run one attack at one radius.

    An image that is wrong when clean is not robust and is never attacked. One that is broken is not looked at again,
    neither by the rest of its attack nor by the other attacks of an ensemble; one that goes round in a circle is not
    looked at by the rest of its attack (``Watched``). The global random state stays as it is.

    Args:
        model: takes float images (N, 3, H, W) in [0, 1], gives logits. It works in eval mode and without gradients of
            its parameters; both are put back.
        batch: all images; their random numbers belong to ``indices``.
        clean_correct: bool (N,), which images are right when clean.
        batch_size: images attacked together.
        forward_batch: images of a forward pass; see ``Watched``.
        source: another model, which the attack is computed on, and whose images are then shown to the model.

    Raises:
        NonFiniteError: the attack made a NaN, or the model answers one.
        GuardError: an image left [0, 1], or the ball of an attack that must stay in it.
    """
    batch, right = batch.to("cpu"), clean_correct.cpu()
    built = build(planned, num_classes, seed, batch.images[0].numel())
    robust = right.clone()
    size = batch_size if built.together else 1
    parts = max(len(built.stages), 1)
    with (
        lent(model, forward_batch) as network,
        contextlib.nullcontext(network) if source is None else lent(source, forward_batch) as shown,
        Progress(parts * int(right.sum()), planned.label, "image", quiet=quiet) as progress,
    ):
        for stage in built.stages:
            pending = robust.nonzero().flatten()
            for rows in pending.split(size) if len(pending) else ():
                broken = _attack(network, shown, batch, rows, built, stage, planned.label)
                robust[rows[broken]] = False
                progress.update(len(rows), accuracy=f"{int(robust.sum()) / len(robust):.3f}")
            progress.update(int(right.sum()) - len(pending))
        forward = network.forward_passes + (shown.forward_passes if source is not None else 0)
        backward = shown.backward_passes
    specification = {**built.specification, "seed": seed, "forward_batch": forward_batch}
    return AttackResult(planned.name, planned.norm, planned.epsilon, robust, right, forward, backward, specification)


def _attack(
    network: Watched, shown: Watched, batch: Batch, rows: Tensor, built: BuiltAttack, stage: Stage, label: str
) -> Tensor:
    """bool (rows,): which of these images a stage breaks."""
    clean, labels = batch.images[rows].to(network.device) / 255, batch.labels[rows].to(network.device)
    indices = batch.indices[rows].tolist()
    # A mean over a power of two rounds nothing, so that an image's gradient is that of a smaller batch; and two rows
    # at least, for sums over the values of a single image are cut into other pieces than those of several.
    filled = 1 << max(len(rows) - 1, 1).bit_length() if built.together else len(rows)
    padding = torch.arange(filled, device=clean.device).clamp(max=len(rows) - 1)
    images, truth = clean[padding], labels[padding]
    shown.attack(images, truth, len(rows), built.threat if shown is network else None, stage.memoryless)
    purpose = f"attack:{label}:{stage.key}"
    try:
        with (
            seeded(built.seed, purpose, indices[0]),
            PerImage(built.seed, purpose, indices, filled if built.together else -1),
            torch.enable_grad(),
        ):
            found = stage.start(shown, indices)(images, truth).detach()[: len(rows)]
    except NothingLeft:
        return shown.broken[: len(rows)].cpu()
    finally:
        shown.release()
    broken = shown.broken[: len(rows)].clone() if shown is network else torch.zeros_like(labels, dtype=torch.bool)
    left = (~(broken | shown.circling[: len(rows)])).nonzero().flatten()
    if len(left):
        _check_images(found[left], clean[left], built.threat, stage.searching, label)
        wrong = answers(network, found[left], f"images of {label}").argmax(1) != labels[left]
        broken[left] = wrong & built.threat.allows(found[left], clean[left])
    return broken.cpu()


def _check_images(adversarial: Tensor, clean: Tensor, threat: Threat, searching: bool, label: str) -> None:
    if not adversarial.isfinite().all():
        raise NonFiniteError(
            f"The attack {label} made NaN pixels, as some do where a gradient vanishes; leave it out of attacks.suite."
        )
    if adversarial.min() < -TOLERANCE or adversarial.max() > 1 + TOLERANCE:
        raise GuardError(f"The attack {label} left the pixel range [0, 1]; leave it out of attacks.suite.")
    if searching or threat.allows(adversarial, clean).all():
        return
    distance = float(threat.distance(adversarial, clean).max())
    if threat.norm == "Linf":
        raise GuardError(
            f"The attack {label} moved a pixel by {255 * distance:.4f}/255, beyond its radius of "
            f"{255 * (threat.radius or 0):g}/255; leave it out of attacks.suite."
        )
    raise GuardError(
        f"The attack {label} moved an image by {distance:.4f}, beyond its L2 radius of {threat.radius:g}; "
        "leave it out of attacks.suite."
    )
