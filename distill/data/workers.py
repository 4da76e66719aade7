"""Work spread over processes of this machine, and a lock between processes."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from distill.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


def spread(function: Callable[[T], R], items: Iterable[T], workers: int, chunk: int = 16) -> Generator[R, None, None]:
    """``function(item)`` for every item, in order, computed by forked worker processes.

    The function must be importable and must not use torch: the threads of the parent's torch do not exist in a fork.
    Workers are a few chunks ahead of what is taken, end with the iteration, also when it is left early, and when the
    parent is killed.

    Args:
        workers: processes; 0 computes in this one.
        chunk: items that a worker takes at once.

    Raises:
        DataError: when a worker dies. What the function raises is raised here.
    """
    rest = iter(items)
    first = list(itertools.islice(rest, chunk + 1))
    if workers < 1 or len(first) <= chunk:
        yield from map(function, itertools.chain(first, rest))
        return
    if isinstance(items, Sized):
        workers = min(workers, -(-len(items) // chunk))
    source = itertools.chain(first, rest)
    chunks = iter(lambda: list(itertools.islice(source, chunk)), [])
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin_worker,
        initargs=(os.getpid(),),
    ) as pool:
        under_way: deque[Future[list[R]]] = deque()
        try:
            for part in chunks:
                under_way.append(pool.submit(_all_of, function, part))
                if len(under_way) > CHUNKS_AHEAD * workers:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(WORKER_DIED) from error
        finally:
            pool.shutdown(cancel_futures=True)


CHUNKS_AHEAD = 2
"""Chunks for each worker that may be under way or done and not yet taken."""


def _all_of(function: Callable[[T], R], items: list[T]) -> list[R]:
    return [function(item) for item in items]


WORKER_DIED = (
    "A worker process that reads images was killed, probably because memory or shared memory (/dev/shm) ran out; "
    "use fewer with loader.workers, or free memory."
)


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    quiet_worker()
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    # A killed parent closes nothing: its workers hold each other's ends of the pipes and would wait for ever.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def quiet_worker() -> None:
    """Settings of any decoding worker: Ctrl-C is the parent's business, and so are warnings about odd metadata."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file between the processes of one machine; the kernel frees it when its holder dies.

    File systems without locks are used without: everything that is written under a lock is also renamed into place, so
    that two writers do the work twice, and may have to be started again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
