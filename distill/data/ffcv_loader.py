"""The loader of FFCV's .beton files.

FFCV's format, reader, decoder and quasi-random order are used, not its ``Loader``: that one draws crops from generators
that cannot be counted, starts a thread and new JPEG decoders every epoch that are never freed, keeps that thread when
an epoch is left early, and waits for ever when it fails. Nothing here builds its ``Graph`` either, whose
``group_operations`` does not end for some pipelines (libffcv issue 396).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config import Config
from distill.data.beton import BetonLayout, beton_file
from distill.data.catalogue import PreparedSet
from distill.data.geometry import take_view
from distill.data.ordered_loader import OrderedLoader, Reading, Shares
from distill.data.pages import MappedFile, PageCache, threads
from distill.data.samples import Samples
from distill.errors import DataError, MissingPackageError
from distill.randomness import seed_for

PACKAGE = "ffcv"
INSTALL = (
    "apt-get install libopencv-dev libturbojpeg0-dev pkg-config, then pip install 'guard-distill[ffcv]' "
    "(it is compiled at installation)"
)
AHEAD = 3
"""Batches that are decoded before they are asked for."""
RAW = 1
"""FFCV's code of a record of pixels; 0 is JPEG."""


def library() -> SimpleNamespace:
    """The parts of FFCV that are used here.

    Raises:
        MissingPackageError: FFCV, or a system library of it, is not installed.
    """
    count = torch.get_num_threads()
    try:
        import ffcv.fields
        import ffcv.libffcv
        import ffcv.reader
        import ffcv.traversal_order.quasi_random
        import ffcv.types
    except (ImportError, OSError) as error:
        raise MissingPackageError(f"FFCV could not be imported ({error}); install it with: {INSTALL}.") from error
    finally:
        torch.set_num_threads(count)  # Importing ffcv sets torch to one thread (ffcv/pipeline/compiler.py).
    return SimpleNamespace(
        fields=ffcv.fields,
        types=ffcv.types,
        Reader=ffcv.reader.Reader,
        imdecode=ffcv.libffcv.imdecode,
        quasi_random=ffcv.traversal_order.quasi_random.generate_order_inner,
    )


class FfcvLoader(OrderedLoader):
    """Batches from a .beton file, decoded, cropped and flipped by threads.

    Args:
        path: a file of ``data_prep``, whose record i is image i of the whole stored split.
        order: "random", or "quasi_random": FFCV's order, with 2 · batch_size pages of the file open at a time.
        cache: "page" maps the file into memory; "process" reads pages and keeps those that are needed again.

    Raises:
        DataError: when the labels of the file are not those of the samples.
    """

    def __init__(self, samples: Samples, reading: Reading, path: Path, order: str = "random", cache: str = "page"):
        self.ffcv, self.path, self.cache = library(), path, cache
        self._mapped: MappedFile | None = None
        reader = self.ffcv.Reader(str(path))
        images, labels = (reader.metadata[name][samples.rows] for name in reader.metadata.dtype.names)
        if not np.array_equal(labels, samples.labels):
            raise DataError(f"The labels of {path} are not those of the data set; remove it and prepare it again.")
        sizes = np.zeros(int(reader.num_samples), dtype=np.int64)
        sizes[reader.alloc_table["sample_id"].astype(np.int64)] = reader.alloc_table["size"]
        self.page_size = int(reader.page_size)
        self.starts, self.sizes = images["data_ptr"].astype(np.int64), sizes[samples.rows]
        self.shapes = np.stack([images["height"], images["width"]], axis=1).astype(np.int64)
        self.raw = images["mode"] == RAW
        super().__init__(samples, reading, self._quasi_random if order == "quasi_random" else None)

    def _images(self, epoch: int, size: int, shares: Shares) -> Generator[Tensor, None, None]:
        pool = threads(self.reading.workers)
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
        with self._open(shares, pool) as file:
            try:
                for number, share in enumerate(shares):
                    file.begin(number)
                    waiting.append(self._begin(pool, file, epoch, size, share))
                    if number >= AHEAD:
                        yield self._finished(waiting.popleft())
                        file.end(number - AHEAD)
                while waiting:
                    yield self._finished(waiting.popleft())
            finally:  # No thread may read from a closed file.
                rest = [future for _, futures in waiting for future in futures if not future.cancel()]
                for future in rest:
                    future.exception()

    def _open(
        self, shares: Shares, pool: ThreadPoolExecutor
    ) -> contextlib.AbstractContextManager[MappedFile | PageCache]:
        if self.cache == "page":
            self._mapped = self._mapped or MappedFile(self.path)
            return self._mapped
        pages = [np.unique(self.starts[share] // self.page_size) for share in shares]
        return PageCache(self.path, self.page_size, pages, pool, AHEAD)

    def _begin(
        self, pool: ThreadPoolExecutor, file: MappedFile | PageCache, epoch: int, size: int, share: NDArray[np.int64]
    ) -> tuple[Tensor, list[Future[None]]]:
        """Start to decode a batch, a part of it in each thread."""
        images = torch.empty((len(share), 3, size, size), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        count = max(1, self.reading.workers)
        parts = zip(np.array_split(share, count), np.array_split(images.numpy(), count), strict=True)
        return images, [pool.submit(self._fill, file, epoch, size, *part) for part in parts if len(part[0])]

    def _finished(self, begun: tuple[Tensor, list[Future[None]]]) -> Tensor:
        images, futures = begun
        for future in futures:
            future.result()
        return images.to(self.device, non_blocking=self.device.type == "cuda")

    def _fill(
        self, file: MappedFile | PageCache, epoch: int, size: int, share: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> None:
        """Decode records into ``out``, uint8 (N, 3, size, size)."""
        views = self._views(epoch, size, share, self.shapes[share])
        for row, position in enumerate(share.tolist()):
            out[row] = take_view(self._decode(file, position), views, row)

    def _decode(self, file: MappedFile | PageCache, position: int) -> NDArray[np.uint8]:
        """One record: uint8 (H, W, 3)."""
        record = file.read(int(self.starts[position]), int(self.sizes[position]))
        height, width = self.shapes[position].tolist()
        if self.raw[position]:
            return record.reshape(height, width, 3)
        image = np.empty((height, width, 3), dtype=np.uint8)
        if self.ffcv.imdecode(record, image, height, width, height, width):
            raise DataError(
                f"Record {self.samples.rows[position]} of {self.path} is damaged; remove the file and run guard "
                f"prepare with format=ffcv again."
            )
        return image

    def _quasi_random(self, epoch: int) -> NDArray[np.int64]:
        pages, page_of = np.unique(self.starts // self.page_size, return_inverse=True)
        counts = np.bincount(page_of)
        members = np.argsort(page_of, kind="stable")
        table = np.zeros((len(pages), counts.max()), dtype=np.int64)
        column = np.arange(len(members)) - np.repeat(np.cumsum(counts) - counts, counts)
        table[page_of[members], column] = members
        order = np.empty(len(members), dtype=np.int64)
        seed = seed_for(self.reading.seed, "order", epoch) % 2**32
        self.ffcv.quasi_random(seed, table, counts.astype(np.int64), order, 2 * self.reading.batch_size)
        return order


def build(config: Config, prepared: PreparedSet, samples: Samples, reading: Reading) -> FfcvLoader:
    """The loader of ``loader=ffcv``.

    Raises:
        DataError: when the .beton file is missing, damaged, or was written from other images.
    """
    path, _ = beton_file(prepared, BetonLayout.of(config.format, config.dataset), samples.stored)
    return FfcvLoader(samples, reading, path, config.loader.order or "random", config.loader.cache or "page")
