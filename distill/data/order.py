"""Which images make up each batch: a function of (seed, epoch), shared over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.errors import ConfigError
from distill.randomness import permutation


@dataclass(frozen=True)
class Order:
    """The batches of one rank.

    In training the order is a new permutation each epoch, the last partial global batch is left out, and each rank
    takes its contiguous, equal share of every global batch. In evaluation the order is that of the samples and
    nothing is left out: the shares of a global batch differ by at most one image, and an empty share is no batch.

    Attributes:
        size: number of samples.
        batch_size: images of a global batch, over all ranks.
        shuffle: True for training.

    Raises:
        ConfigError: when training batches cannot be shared equally, or there are fewer images than one batch.
    """

    size: int
    batch_size: int
    seed: int
    shuffle: bool
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not self.shuffle:
            return
        if self.batch_size % self.world_size:
            below = self.batch_size // self.world_size * self.world_size
            sizes = [str(size) for size in (below, below + self.world_size) if size]
            raise ConfigError(
                f"The batch size {self.batch_size} cannot be shared equally by {self.world_size} ranks; "
                f"nearby sizes that can: {', '.join(sizes)}."
            )
        if self.size < self.batch_size:
            raise ConfigError(
                f"The training set has {self.size} images, fewer than one batch of {self.batch_size}; "
                f"choose a batch size of at most {self.size} or more images per class."
            )

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        if self.shuffle:
            return self.size // self.batch_size
        return sum(1 for _ in self.batches(0))

    def batches(self, epoch: int, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """This rank's positions in each batch of an epoch, from batch ``start`` on."""
        order = permutation(self.seed, "order", epoch, self.size) if self.shuffle else np.arange(self.size)
        whole = self.size // self.batch_size * self.batch_size if self.shuffle else self.size
        for first in range(start * self.batch_size, whole, self.batch_size):
            share = np.array_split(order[first : min(first + self.batch_size, whole)], self.world_size)[self.rank]
            if len(share):
                yield share
