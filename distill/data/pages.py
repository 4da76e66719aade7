"""A large file read by threads: through the operating system's page cache, or page by page into this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from distill.environment import detect
from distill.errors import ConfigError, DataError

_POOLS: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_POOLS.clear)  # A fork has the pool and not its threads.


def threads(count: int) -> ThreadPoolExecutor:
    """A pool of ``count`` threads, at least one, that lasts as long as this process: libjpeg-turbo's decoders in FFCV
    belong to a thread and are never freed."""
    count = max(1, count)
    if count not in _POOLS:
        _POOLS[count] = ThreadPoolExecutor(count, thread_name_prefix="read")
    return _POOLS[count]


class MappedFile:
    """A file in memory through the page cache of the operating system, which all processes of a machine share.

    It may be entered any number of times: a new mapping would meet its pages one by one again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.memory = np.memmap(path, dtype=np.uint8, mode="r")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, batch: int) -> None:
        """Nothing to do."""

    def end(self, batch: int) -> None:
        """Nothing to do."""

    def read(self, start: int, size: int) -> NDArray[np.uint8]:
        """Bytes that lie inside one page: uint8 (size,)."""
        return np.asarray(self.memory[start : start + size])


class PageCache:
    """Pages that are read once and kept while batches to come need them, for file systems without a page cache.

    Args:
        page_size: in bytes; nothing that is read crosses a page.
        pages: the numbers of the pages that each batch needs.
        pool: reads.
        ahead: batches that have begun when one ends.

    Raises:
        ConfigError: when this machine has too little memory for all pages that are needed at once.
    """

    def __init__(
        self, path: Path, page_size: int, pages: Sequence[NDArray[np.int64]], pool: ThreadPoolExecutor, ahead: int = 0
    ):
        self.path, self.page_size, self.pages, self.pool = path, page_size, pages, pool
        self.first_need: dict[int, int] = {}
        self.last_need: dict[int, int] = {}
        for batch, numbers in enumerate(pages):
            for page in numbers.tolist():
                self.first_need.setdefault(page, batch)
                self.last_need[page] = batch
        self._check_memory(ahead)
        self.kept: dict[int, Future[NDArray[np.uint8]]] = {}

    def __enter__(self) -> Self:
        self.file = os.open(self.path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        for future in [future for future in self.kept.values() if not future.cancel()]:
            future.exception()
        self.kept.clear()
        os.close(self.file)

    def begin(self, batch: int) -> None:
        """Start to read the pages that a batch needs and that are not there. Batches begin in order."""
        for page in self.pages[batch].tolist():
            if page not in self.kept:
                self.kept[page] = self.pool.submit(self._read_page, page)

    def end(self, batch: int) -> None:
        """Forget the pages that no later batch needs."""
        for page in self.pages[batch].tolist():
            if self.last_need[page] == batch:
                del self.kept[page]

    def read(self, start: int, size: int) -> NDArray[np.uint8]:
        """Bytes that lie inside one page of a batch that has begun: uint8 (size,)."""
        page, offset = divmod(start, self.page_size)
        # The pool takes tasks in order: whoever waits here was submitted after what it waits for.
        return self.kept[page].result()[offset : offset + size]

    def _read_page(self, page: int) -> NDArray[np.uint8]:
        content, done = np.empty(self.page_size, dtype=np.uint8), 0
        while done < self.page_size:  # A network file system may give less than it is asked for.
            got = os.preadv(self.file, [content[done:].data], page * self.page_size + done)
            if not got:
                raise DataError(f"{self.path} ends within its page {page}; remove it and prepare it again.")
            done += got
        return content

    def _check_memory(self, ahead: int) -> None:
        change = np.zeros(len(self.pages) + 1, dtype=np.int64)
        np.add.at(change, list(self.first_need.values()), 1)
        np.add.at(change, [min(last + 1 + ahead, len(self.pages)) for last in self.last_need.values()], -1)
        processes = detect().local_world_size
        needed = int(np.cumsum(change).max()) * self.page_size * processes
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > 0.8 * present:
            raise ConfigError(
                f"loader.cache=process would keep {needed / 2**30:.0f} GiB of {self.path} in the memory of {processes} "
                f"processes, and this machine has {present / 2**30:.0f} GiB; use loader.order=quasi_random, or "
                f"loader.cache=page."
            )
