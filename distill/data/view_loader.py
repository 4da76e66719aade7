"""The views of a distilled set as a loader for student training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.data.labels import SoftLabelStore, reused, stored_epoch
from distill.data.order import Order
from distill.data.views import ViewBatch, Views
from distill.randomness import permutation


class Teacher(Protocol):
    """Answers views: float images (N, 3, H, W) in [0, 1] → logits (N, classes)."""

    def __call__(self, images: Tensor) -> Tensor: ...


class ViewLoader:
    """Shuffled batches of views; every image once an epoch, the last batch may be smaller.

    A single image that is left over joins the batch before it: batch norm cannot take it alone in a network that ends
    in maps of one pixel.

    Where only some epochs are stored, views and labels are those of ``stored_epoch``, varied as ``reused`` says; the
    order of the images is that of the student's own epoch.

    Args:
        views: the distilled images and how they are augmented.
        batch_size: images per step.
        seed: seed of the order, one for each student.
        labels: stored soft labels, or None.
        teacher: asked for soft labels instead, or None.
    """

    def __init__(
        self,
        views: Views,
        batch_size: int,
        seed: int,
        labels: SoftLabelStore | None = None,
        teacher: Teacher | None = None,
    ):
        self.views, self.labels, self.teacher = views, labels, teacher
        self.epoch, self.position = 0, 0
        count = len(views.images)
        self._order = Order(
            count,
            batch_size,
            seed,
            shuffle=True,
            drop_last=False,
            permute=lambda epoch: permutation(seed, "order:student", epoch, count),
        )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def largest_batch(self) -> int:
        """Images of the largest batch."""
        return self._order.largest_share

    def __iter__(self) -> Iterator[ViewBatch]:
        views, count = self.views, len(self.views.images)
        epoch = stored_epoch(views.config, views.seed, self.epoch)
        for share in self._order.batches(self.epoch, self.position):
            indices = share.tolist()
            batch, logits = views.batch(epoch, indices), None
            images = reused(views.config, views.seed, self.epoch, indices, batch.images)
            if self.labels is not None:
                logits = self.labels.rows(epoch, indices, count, views.images.device)
            elif self.teacher is not None:
                with torch.no_grad():
                    logits = self.teacher(batch.images).float()
            self.position += 1
            yield dataclasses.replace(batch, images=images, logits=logits)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch and how many batches of it were given out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.epoch, self.position = state["epoch"], state["position"]
