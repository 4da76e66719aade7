"""The loader that reads image files: from memory at small sizes, otherwise decoded by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.augment import Augment, batch_view, memory_base
from distill.data.batch import Batch
from distill.data.crops import UNIFORMS
from distill.data.memory import stored_squares
from distill.data.order import Order
from distill.data.samples import Samples
from distill.data.streaming import Key, read_batches
from distill.randomness import uniforms


class FolderLoader:
    """Batches of uint8 images from files, a ``Loader``.

    Crops and flips are counted randomness of (seed, epoch, position of the image): they depend neither on workers
    nor on ranks.

    Args:
        samples: the images.
        batch_size: images of a global batch, over all ranks.
        image_size: height and width of a batch, in pixels.
        stored_size: decode every image once to a square of this side and keep it in memory; 0: decode each time.
        augment: None for evaluation: the samples in their order, none left out, resized and centre-cropped. Such a
            loader starts from the beginning whenever it is iterated, except after ``load_state_dict``.
        workers: processes that decode.
        cache: folder that keeps the decoded squares for the next start.

    Raises:
        ConfigError: see ``Order``; or when stored images would not fit into memory.
        DataError: naming a file that is missing or damaged, when it is read.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        image_size: int,
        stored_size: int,
        augment: Augment | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ):
        self.samples, self.image_size, self.augment, self.seed = samples, image_size, augment, seed
        self.workers, self.device = workers, torch.device(device)
        self.order = Order(len(samples), batch_size, seed, augment is not None, rank, world_size)
        self.memory: Tensor | None = None
        if stored_size:
            squares = stored_squares(samples, stored_size, workers=workers, cache=cache, quiet=rank != 0)
            self.memory = memory_base(squares, image_size, augment)
        self.epoch, self.position, self._restored = 0, 0, False

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if self.augment is None and not self._restored:
            self.position = 0
        self._restored = False
        keys = [(self.epoch, share) for share in self.order.batches(self.epoch, self.position)]
        for batch in self._from_memory(keys) if self.memory is not None else self._from_files(keys):
            self.position += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch and how many of its batches were handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; skipped batches are not decoded."""
        self.epoch, self.position, self._restored = int(state["epoch"]), int(state["position"]), True

    def _from_memory(self, keys: list[Key]) -> Iterator[Batch]:
        assert self.memory is not None
        labels = torch.from_numpy(self.samples.labels)
        for epoch, share in keys:
            indices = torch.from_numpy(share)
            batch = Batch(self.memory[indices], labels[indices], indices, epoch).to(self.device)
            if self.augment is not None:
                numbers = uniforms(self.seed, "augment", epoch, share.tolist(), UNIFORMS)
                images = batch_view(batch.images, self.image_size, self.augment, numbers)
                batch = replace(batch, images=images)
            yield batch

    def _from_files(self, keys: list[Key]) -> Iterator[Batch]:
        columns = read_batches(
            self.samples, keys, self.image_size, self.augment, self.seed, self.workers, self.device.type == "cuda"
        )
        for images, labels, indices, epoch in columns:
            yield Batch(images, labels, indices, epoch).to(self.device)


build = FolderLoader
