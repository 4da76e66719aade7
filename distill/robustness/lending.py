"""A model handed to an attack, and taken back as it was; what an attack asks of it is watched (SPEC §3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.errors import NonFiniteError
from distill.regularizers.numerics import ieee_float32
from distill.robustness.folding import folded
from distill.robustness.threat import Threat

SHORTEST, SHARE = 4, 8
"""An image is compared with one that it was at most that many steps ago, or that part of all steps so far."""


class NothingLeft(Exception):
    """The attack has nothing left to do: every image that it was given is broken, or goes round in a circle."""


class Watched(nn.Module):
    """What an attack sees of a model.

    It computes in forward passes of one size, so that what it answers on an image does not depend on the other images.
    While a batch is attacked it notices the images that are broken, keeps how, and asks the network no more about
    them; and it counts the network's passes.

    Nor does it ask about an image that goes round in a circle. An attack without memory makes each image from the one
    before alone, here bit for bit; so where one comes back that was there before, all that would follow has been seen,
    and none of it broke the image. PGD on L∞ gets there soon: its steps have one size and lead to corners of the ball.

    Args:
        model: takes images in [0, 1], gives logits (N, classes).
        device: of the model.
        forward_batch: images of a forward pass; the last one is filled up.

    Attributes:
        forward_passes, backward_passes: summed over images, without those that fill up.
        broken: bool (rows,), of the batch under attack.
        circling: bool (rows,), the images that nothing new can come of.
        adversarial: (rows, C, H, W), the first image that broke each.
    """

    def __init__(self, model: nn.Module, device: torch.device, forward_batch: int):
        super().__init__()
        # torchattacks asks the first parameter for the device; a model may have none.
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.model: nn.Module | None = model
        self.device, self.forward_batch = device, forward_batch
        self.forward_passes = self.backward_passes = 0
        self.threat: Threat | None = None
        self.rows = -1

    def attack(
        self, clean: Tensor, labels: Tensor, count: int, threat: Threat | None, memoryless: bool = False
    ) -> None:
        """Begin to watch a batch.

        Args:
            clean: images in [0, 1] (rows, C, H, W), of which the first ``count`` are attacked; the others fill up.
            labels: int64 (rows,).
            threat: what breaks an image; None drops none and breaks none, as when another model is the victim.
            memoryless: whether the attack makes its next image of an image from the present one alone.
        """
        self.clean, self.labels, self.threat = clean, labels, threat
        self.memoryless = memoryless and threat is not None
        self.steps, self.renewal = 0, SHORTEST
        self.earlier = torch.full_like(clean, torch.nan) if self.memoryless else clean
        self.broken = torch.arange(len(clean), device=clean.device) >= count
        self.circling = torch.zeros_like(self.broken)
        self.adversarial = clean.clone()
        self.rows = len(clean)

    def release(self) -> None:
        """Stop watching; what was found stays."""
        self.rows = -1

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes). In a whole batch, rows that are done with get a constant answer without a gradient."""
        if len(images) != self.rows:
            return self.logits(images)
        alive = (~(self.broken | self.circling)).nonzero().flatten()
        if not len(alive):
            raise NothingLeft
        if len(alive) == self.rows:
            answers = self.logits(images)
            self._notice(images, answers, alive)
            return answers
        part = self.logits(images[alive])
        self._notice(images[alive], part, alive)
        answers = torch.zeros(self.rows, part.shape[1], dtype=part.dtype, device=part.device)
        answers[torch.arange(self.rows, device=part.device), self.labels] = -1.0
        return answers.index_copy(0, alive, part)

    def logits(self, images: Tensor) -> Tensor:
        """The model's answers, in passes of ``forward_batch`` images."""
        assert self.model is not None
        count, size = len(images), self.forward_batch
        if images.requires_grad:
            # Attacks flatten gradients as if they had the layout of their images.
            images = images.view_as(images)
            images.register_hook(Tensor.contiguous)
        if lacking := -count % size:
            images = torch.cat([images, images[-1:].detach().expand(lacking, *images.shape[1:])])
        images = images.contiguous(memory_format=torch.channels_last)
        # float32 whatever the model computes in: attacks keep what they find in tensors of that type.
        logits = torch.cat([self.model(part) for part in images.split(size)])[:count].float()
        self.forward_passes += count
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_passes += len(gradient)

    def _notice(self, images: Tensor, answers: Tensor, rows: Tensor) -> None:
        if self.threat is None:
            return
        with torch.no_grad():
            wrong = (answers.argmax(1) != self.labels[rows]) & answers.isfinite().all(1)
            if wrong.any():
                wrong &= self.threat.allows(images, self.clean[rows])
                self.adversarial[rows[wrong]] = images[wrong]
                self.broken[rows[wrong]] = True
            if self.memoryless and images.requires_grad:
                self._compare(images, rows)

    def _compare(self, images: Tensor, rows: Tensor) -> None:
        """Find the images that are what they were some steps ago; now and then, take new ones to compare with.

        One image is kept of each, not all of them, as in Brent's search for cycles. It is renewed the less often the
        longer the attack goes on, so that longer circles are found later.
        """
        self.steps += 1
        self.circling[rows] |= (images == self.earlier[rows]).flatten(1).all(1)
        if self.steps >= self.renewal:
            self.earlier[rows] = images
            self.renewal = self.steps + max(SHORTEST, self.steps // SHARE)


@contextlib.contextmanager
def lent(model: nn.Module, forward_batch: int = 32) -> Iterator[Watched]:
    """The model in eval mode, its parameters fixed, cuDNN deterministic, in IEEE float32; all is put back at the end.

    Batch norm is folded into the convolutions where that is safe, for clean images as for attacked ones, so that one
    function answers on all. TF32 and autocast are off because they move logits by 1e-3 and more, enough to change
    outcomes near the boundary.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    device = wanted[0][0].device if wanted else torch.device("cpu")
    # torchattacks keeps every object that was ever assigned to an attack's attribute in a list of its module, for ever:
    # were it not for the model taken out at the end, every student that was attacked would stay in memory.
    handle = Watched(model, device, forward_batch)
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        handle.eval()
        handle.model = folded(model).eval()
        with ieee_float32(device.type):
            yield handle
    finally:
        handle.model = None
        cudnn.deterministic, cudnn.benchmark = before
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def answers(network: Watched, images: Tensor, what: str) -> Tensor:
    """Logits on images that are not under attack. Raises NonFiniteError where one is NaN or infinite."""
    with torch.no_grad():
        logits = network.logits(images)
    if not logits.isfinite().all():
        raise NonFiniteError(f"The network answers NaN or infinite logits on {what}; its weights are broken.")
    return logits
