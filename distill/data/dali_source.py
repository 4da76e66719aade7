"""What NVIDIA DALI is fed with: encoded files, and the numbers that say what is done with each image."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.decode import read_image
from distill.data.geometry import Cut, Views
from distill.data.samples import Samples
from distill.errors import DataError

AHEAD = 3
"""Batches whose files are read before DALI asks for them."""


class Source:
    """A callable that gives the next batch: its files as uint8 arrays, then ``numbers_of`` its views.

    It ends at a file that cannot be read and keeps the error, so that the batches before it are handed out first.

    Args:
        batches: the batches to come, asked for one at a time.
        workers: threads that read; 0 reads in the call.
        whole: whether DALI takes every step, or the first one if that is a cut.

    Attributes:
        under_way: what was given and is not taken from here: oldest first.
        error: why the batches ended before their time.
    """

    def __init__(self, samples: Samples, batches: Sequence[Callable[[], Views]], workers: int, whole: bool):
        self.samples, self.whole = samples, whole
        self.batches = iter(batches)
        self.parts = max(1, workers)
        self.pool = ThreadPoolExecutor(workers, "read") if workers else None
        self.ahead: deque[tuple[Views, list[Callable[[], list[NDArray[np.uint8]]]]]] = deque()
        self.under_way: deque[Views] = deque()
        self.error: DataError | None = None

    def __call__(self) -> list[Any]:
        while len(self.ahead) < AHEAD and (batch := next(self.batches, None)) is not None:
            views = batch()
            self.ahead.append((views, [self._read(part) for part in np.array_split(views.share, self.parts)]))
        if self.error is not None or not self.ahead:
            raise StopIteration
        views, parts = self.ahead.popleft()
        try:
            files = [file for part in parts for file in part()]
        except DataError as error:
            self.error = error
            raise StopIteration from None
        self.under_way.append(views)
        return [files, *numbers_of(views, self.whole)]

    def _read(self, part: NDArray[np.int64]) -> Callable[[], list[NDArray[np.uint8]]]:
        read = partial(_encoded_files, self.samples, part)
        return read if self.pool is None else self.pool.submit(read).result

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def numbers_of(views: Views, whole: bool) -> list[NDArray[Any]]:
    """Start and shape of each cut, sizes of each resize, and flips, in this order: an array (N, …) each.

    Args:
        whole: of every step; otherwise of the first one, if that is a cut.
    """
    numbers: list[NDArray[Any]] = []
    for step in views.steps if whole else views.steps[:1]:
        if isinstance(step, Cut):
            numbers += [step.boxes[:, :2].astype(np.int32), step.boxes[:, 2:].astype(np.int32)]
        elif whole:
            numbers.append(step.sizes.astype(np.float32))
    return [*numbers, views.flip.astype(np.int32)] if whole else numbers


def _encoded_files(samples: Samples, positions: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    return [encoded_file(samples, position) for position in positions.tolist()]


def encoded_file(samples: Samples, position: int) -> NDArray[np.uint8]:
    """A file that every decoder reads alike: the bytes of a plain JPEG, or a PNM of Pillow's pixels; uint8 (bytes,).

    Raises:
        DataError: when the file is missing, damaged, or not the one that was prepared.
    """
    path, index = samples.path(position), samples.index
    if index.plain[position]:
        with contextlib.suppress(OSError):  # Pillow meets it again and says what it is.
            content = path.read_bytes()
            if len(content) == index.sizes[position]:
                return np.frombuffer(content, np.uint8)
    image = read_image(path)
    if path.stat().st_size != index.sizes[position] or image.size[::-1] != tuple(index.shapes[position]):
        raise DataError(f"The image {path} is not the one that was prepared; prepare the data set again.")
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)
