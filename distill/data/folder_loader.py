"""The loader that reads image files: from memory at small sizes, otherwise decoded by worker processes."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

from distill.config import Config
from distill.data.augment import batch_view, memory_base
from distill.data.catalogue import PreparedSet
from distill.data.crops import UNIFORMS
from distill.data.memory import stored_squares
from distill.data.ordered_loader import OrderedLoader, Reading, Shares
from distill.data.samples import Samples
from distill.data.streaming import read_batches
from distill.randomness import uniforms


class FolderLoader(OrderedLoader):
    """Batches from image files. With ``stored_size`` every image is decoded once and kept in memory as a square.

    Args:
        cache: folder that keeps the decoded squares for the next start.

    Raises:
        ConfigError: when stored images would not fit into memory.
    """

    def __init__(self, samples: Samples, reading: Reading, cache: Path | None = None):
        super().__init__(samples, reading)
        self.memory: Tensor | None = None
        if reading.stored_size:
            squares = stored_squares(
                samples, reading.stored_size, workers=reading.workers, cache=cache, quiet=reading.rank != 0
            )
            self.memory = memory_base(squares, reading.resolution.at(0), reading.augment)

    def _images(self, epoch: int, size: int, shares: Shares) -> Generator[Tensor, None, None]:
        if self.memory is not None:
            return self._from_memory(self.memory, epoch, size, shares)
        return self._from_files(epoch, size, shares)

    def _from_memory(self, memory: Tensor, epoch: int, size: int, shares: Shares) -> Generator[Tensor, None, None]:
        augment, seed = self.reading.augment, self.reading.seed
        for share in shares:
            images = memory[torch.from_numpy(share)].to(self.device, non_blocking=self.device.type == "cuda")
            if augment is not None:
                numbers = uniforms(seed, "augment", epoch, share.tolist(), UNIFORMS)
                images = batch_view(images, size, augment, numbers)
            yield images

    def _from_files(self, epoch: int, size: int, shares: Shares) -> Generator[Tensor, None, None]:
        r = self.reading
        pin = self.device.type == "cuda"
        yield from read_batches(self.samples, epoch, size, shares, r.augment, r.seed, r.workers, pin)


def build(config: Config, prepared: PreparedSet, samples: Samples, reading: Reading) -> FolderLoader:
    """The loader of ``loader=folder``."""
    return FolderLoader(samples, reading, cache=prepared.folder)
