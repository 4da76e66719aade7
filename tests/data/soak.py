"""One loader read for a long time: ``python -m tests.data.soak KIND FOLDER SECONDS`` prints what it used, as JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

from distill.data.catalogue import PreparedSet
from tests.data.reading import configure, make_loader


def resident(process: int | str = "self") -> int:
    """Resident memory of a process, in KiB, mapped files left out: they are the page cache's."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def main(kind: str, folder: str, seconds: str) -> None:
    torch.set_num_threads(1)
    prepared = PreparedSet.open(Path(folder))
    config = configure(prepared, kind, "dataset.image_size=224")
    loaders = [
        make_loader(config, prepared, size=224, batch_size=16),
        make_loader(config, prepared, size=224, batch_size=16, augment=None),
    ]
    began, epochs, peaks = time.monotonic(), 0, [[0, 0, 0] for _ in range(4)]
    while (elapsed := time.monotonic() - began) < float(seconds):
        peak = peaks[int(4 * elapsed / float(seconds))]
        for loader in loaders:
            loader.set_epoch(epochs)
            for number, batch in enumerate(loader):
                children = [child.pid for child in multiprocessing.active_children() if child.pid]
                peak[0] = max(peak[0], resident() + sum(map(resident, children)))
                if epochs % 10 == 9 and number == 2:
                    break  # An epoch that is left early now and then.
                del batch
            # At rest: while threads read, one or the other holds a file open.
            peak[1:] = map(max, peak[1:], tasks_and_files())
        epochs += 1
    print(json.dumps({"kind": kind, "epochs": epochs, "images": epochs * 2 * len(loaders[0].samples), "peaks": peaks}))


def tasks_and_files() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    main(*sys.argv[1:])
