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
    began, epochs, used = time.monotonic(), 0, []
    while (elapsed := time.monotonic() - began) < float(seconds):
        for loader in loaders:
            loader.set_epoch(epochs)
            for number, batch in enumerate(loader):
                children = [child.pid for child in multiprocessing.active_children() if child.pid]
                used.append([elapsed, resident() + sum(map(resident, children)), *tasks_and_files()])
                if epochs % 10 == 9 and number == 2:
                    break  # An epoch that is left early now and then.
                del batch
        epochs += 1
    quarters = [[row for row in used if int(4 * row[0] / float(seconds)) == quarter] for quarter in range(4)]
    peaks = [[max(column) for column in zip(*quarter, strict=True)][1:] for quarter in quarters]
    print(json.dumps({"kind": kind, "epochs": epochs, "images": epochs * 2 * len(loaders[0].samples), "peaks": peaks}))


def tasks_and_files() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    main(*sys.argv[1:])
