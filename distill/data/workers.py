"""Work spread over processes of this machine, and a lock between processes."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from distill.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


def spread(function: Callable[[T], R], items: Sequence[T], workers: int, chunk: int = 16) -> Iterator[R]:
    """``function(item)`` for every item, in order, computed by forked worker processes.

    The function must be importable and must not use torch: the threads of the parent's torch do not exist in a fork.
    Workers end with the iteration, also when it is left early, and when the parent is killed.

    Args:
        workers: processes; 0 computes in this one.
        chunk: items that a worker takes at once.

    Raises:
        DataError: when a worker dies. What the function raises is raised here.
    """
    if workers < 1 or len(items) <= chunk:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(
        min(workers, -(-len(items) // chunk)),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin_worker,
        initargs=(os.getpid(),),
    ) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunk)
        except BrokenProcessPool as error:
            raise DataError(WORKER_DIED) from error
        finally:
            pool.shutdown(cancel_futures=True)


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

    File systems without locks are used without: everything that is written under a lock is also renamed into place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
