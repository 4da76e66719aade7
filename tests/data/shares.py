"""One rank of ``test_loader_processes.py``: writes down which images each of its batches shows, and their bytes.

The ranks need nothing of each other, so that each is that rank of every world size, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from distill.data.batch import Batch
from distill.data.catalogue import PreparedSet
from distill.errors import ConfigError
from tests.data.reading import configure, make_loader

SIZES = (5, 12, 23)


def describe(batch: Batch) -> list[object]:
    return [batch.indices.tolist(), hashlib.sha256(batch.images.contiguous().numpy().tobytes()).hexdigest()]


def main(folder: str, out: str, kinds: str, rank: int, world_size: int) -> None:
    prepared = PreparedSet.open(Path(folder))
    ranks = {"rank": rank, "world_size": world_size}
    found = {}
    for kind in json.loads(kinds):
        config = configure(prepared, kind)
        for size in SIZES:
            samples = prepared.samples("train").choose(size, seed=size)
            for batch_size in (world_size, 2 * world_size, 6 * world_size):
                for drop_last in (True, False):
                    options = {"samples": samples, "batch_size": batch_size, "drop_last": drop_last, **ranks}
                    try:
                        loader = make_loader(config, prepared, size=16, **options)
                    except ConfigError as error:
                        if "fewer than" not in str(error):
                            raise
                        continue
                    epochs = []
                    for epoch in (0, 1):
                        loader.set_epoch(epoch)
                        epochs.append([describe(batch) for batch in loader])
                    position = len(epochs[1]) // 2
                    resumed = make_loader(config, prepared, size=16, **options)
                    resumed.load_state_dict({"epoch": 1, "position": position})
                    rest = [describe(batch) for batch in resumed]
                    found[f"{kind}/{size}/{batch_size}/{drop_last}"] = [epochs, position, rest]
    Path(out, f"{world_size}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for count in range(int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"]) + 1):
        main(*sys.argv[1:], int(os.environ["RANK"]), count)
