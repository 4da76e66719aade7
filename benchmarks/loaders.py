"""How fast each loader reads the same real JPEGs at 224 pixels, as a multiple of torchvision's in the same run.

    python -m benchmarks.loaders --source ../shared/data/imagenet_samples.zip [--rounds 7] [--repeat 16] [--workers 2]

The images of the source (an archive or folder in ImageFolder layout; without one, scikit-learn's two photographs) are
linked ``--repeat`` times, so that an epoch takes seconds. Rounds alternate between the loaders, so that a busy machine
slows all of them; a figure is the median of the rounds after one that warms up. Baseline: torchvision's ImageFolder
with RandomResizedCrop(224), flip and PILToTensor, read by its DataLoader with as many workers. All give uint8.

Floors, through as many threads: reading and decoding the same JPEGs whole with libjpeg-turbo and nothing else, for the
loaders of JPEGs; cropping and resizing records that are in memory and nothing else, for raw records.

Memory is that of a process and its workers at its peak, above what the process had at its start, one process for each
loader: pages shared by several processes count once (PSS), mapped files do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from tabulate import tabulate
from torchvision import datasets
from torchvision.transforms import v2

from data_prep import prepare
from distill.compose import compose
from distill.config import Config
from distill.data.augment import Augment
from distill.data.beton import BetonLayout
from distill.data.catalogue import PreparedSet
from distill.data.crops import UNIFORMS
from distill.data.ffcv_loader import library
from distill.data.geometry import Views, take_view, view_steps
from distill.data.loaders import training_loader
from distill.provenance import environment
from distill.randomness import uniforms

SIZE = 224
BASELINE = "torchvision"
LOADERS = {
    "folder": ["loader=folder"],
    "ffcv raw": ["loader=ffcv", "format.mode=raw"],
    "ffcv proportion 0.1": ["loader=ffcv", "format.mode=proportion"],
    "ffcv jpg": ["loader=ffcv", "format.mode=jpg"],
    "ffcv raw, quasi-random, process cache": [
        "loader=ffcv",
        "format.mode=raw",
        "loader.order=quasi_random",
        "loader.cache=process",
    ],
    "dali": ["loader=dali"],
}
Epoch = Callable[[], int]
"""Reads one epoch; returns how many images it gave."""


def link(source: Path | None, folder: Path, repeat: int) -> int:
    """Link every training image ``repeat`` times below ``folder``/linked; returns the number of classes."""
    if source is None:
        source, repeat = folder / "photographs", 64 * repeat
        for image in (Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"):
            (source / "train" / image.stem).mkdir(parents=True)
            shutil.copy(image, source / "train" / image.stem)
    elif source.is_file():
        shutil.unpack_archive(source, folder / "archive")
        source = folder / "archive"
    (train,) = sorted(source.glob("train")) or sorted(source.glob("*/train"))
    classes = [child for child in sorted(train.iterdir()) if child.is_dir()]
    for child in classes:
        target = folder / "linked/train" / child.name
        target.mkdir(parents=True)
        for image in sorted(child.iterdir()):
            for number in range(repeat):
                (target / f"{number:04d}_{image.name}").symlink_to(image.resolve())
    return len(classes)


def torchvision_epoch(folder: Path, batch_size: int, workers: int) -> Epoch:
    """The baseline: what a training script writes without a project."""
    views = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    images = datasets.ImageFolder(str(folder / "linked/train"), views)
    loader = torch.utils.data.DataLoader(images, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    return lambda: sum(len(labels) for _, labels in loader)


def our_epoch(config: Config) -> Epoch:
    """One epoch of a loader of ours, the next one each time."""
    loader = training_loader(config, PreparedSet.open(Path(config.data_root) / config.dataset.name))

    def read() -> int:
        loader.set_epoch(int(loader.state_dict()["epoch"]) + 1)
        return sum(map(len, loader))

    return read


def floors(config: Config, workers: int) -> dict[str, Epoch]:
    """What no loader can beat with these threads: decoding alone, and cropping and resizing alone."""
    ffcv, prepared = library(), PreparedSet.open(Path(config.data_root) / config.dataset.name)
    index, pool = prepared.index("train"), ThreadPoolExecutor(workers)
    plain = np.flatnonzero(index.plain)

    def decode(position: int) -> int:
        content = np.fromfile(index.path(prepared.root, position), dtype=np.uint8)
        height, width = index.shapes[position].tolist()
        return int(ffcv.imdecode(content, np.empty((height, width, 3), np.uint8), height, width, height, width)) + 1

    reader = ffcv.Reader(str(BetonLayout.of(config.format, config.dataset).folder(prepared) / "train.beton"))
    records = reader.metadata[reader.metadata.dtype.names[0]]
    memory = np.fromfile(reader.file_name, dtype=np.uint8)
    images = []
    for start, height, width in zip(records["data_ptr"], records["height"], records["width"], strict=True):
        size = int(height) * int(width) * 3
        images.append(memory[int(start) : int(start) + size].reshape(int(height), int(width), 3))
    numbers = uniforms(0, "augment", 0, range(len(images)), UNIFORMS)
    shapes = np.stack([records["height"], records["width"]], axis=1).astype(np.int64)
    everything = np.arange(len(images))
    views = Views(everything, view_steps(shapes, SIZE, Augment(), numbers), everything < 0)

    def crop(position: int) -> int:
        take_view(images[position], views, position)
        return 1

    def spread(function: Callable[[int], int], positions: list[int]) -> int:
        parts = [positions[number::workers] for number in range(workers)]
        return sum(pool.map(lambda part: sum(map(function, part)), parts))

    return {
        "floor: read and decode": functools.partial(spread, decode, plain.tolist()),
        "floor: crop and resize": functools.partial(spread, crop, list(range(len(images)))),
    }


def memory() -> int:
    """Anonymous and shared memory of this process and its children, in bytes; what they share counts once."""
    total = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return total


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The peak of ``memory`` above what it was at the beginning, in the list when the block ends."""
    before, peak, stop = memory(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure_memory(name: str, folder: Path, given: argparse.Namespace, classes: int) -> int:
    """Peak memory of two epochs of one loader, in bytes; for a process of its own."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # A spawned process would spawn, which nobody else does.
    with peak_memory() as peak:
        epoch = make_epoch(name, folder, given, classes)
        epoch()
        epoch()
    return peak[0]


def configuration(name: str, folder: Path, given: argparse.Namespace, classes: int) -> Config:
    """The configuration of a loader, with its data prepared."""
    places = [f"dataset.source={folder / 'linked'}", f"data_root={folder / 'data'}", "dataset.name=samples"]
    sizes = [f"dataset.num_classes={classes}", f"squeeze.batch_size={given.batch}", f"loader.workers={given.workers}"]
    config = compose(["dataset=imagenette", *places, *sizes, *LOADERS[name]])
    prepare(config)
    return config


def make_epoch(name: str, folder: Path, given: argparse.Namespace, classes: int) -> Epoch:
    """The epoch of a loader by name."""
    if name == BASELINE:
        return torchvision_epoch(folder, given.batch, given.workers)
    return our_epoch(configuration(name, folder, given, classes))


def disk_bytes(name: str, folder: Path, given: argparse.Namespace, classes: int) -> int:
    """Bytes that a loader reads from."""
    if name.startswith("ffcv"):
        config = configuration(name, folder, given, classes)
        prepared = PreparedSet.open(Path(config.data_root) / config.dataset.name)
        return (BetonLayout.of(config.format, config.dataset).folder(prepared) / "train.beton").stat().st_size
    return sum(file.stat().st_size for file in (folder / "linked").rglob("*") if file.is_file())


def measure(folder: Path, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Images per second, memory and bytes on disk of every loader; images per second of the floors."""
    classes = link(Path(given.source) if given.source else None, folder, given.repeat)
    names = [BASELINE, *LOADERS]
    epochs = {name: make_epoch(name, folder, given, classes) for name in names}
    epochs |= floors(configuration("ffcv raw", folder, given, classes), given.workers)
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(given.rounds + 1):
        for name, epoch in epochs.items():
            began = time.perf_counter()
            count = epoch()
            if number:
                rates[name].append(count / (time.perf_counter() - began))
        print(f"round {number} of {given.rounds}", file=sys.stderr)
    found = {name: {"images_per_second": statistics.median(values)} for name, values in rates.items()}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[name]["peak_memory_bytes"] = pool.submit(measure_memory, name, folder, given, classes).result()
        found[name]["disk_bytes"] = disk_bytes(name, folder, given, classes)
    return found


def main() -> None:
    """Measure, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", help="archive or folder in ImageFolder layout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scratch", help="folder for the prepared data; a temporary one when not given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        found = measure(Path(folder), given)
    baseline = found[BASELINE]["images_per_second"]
    ratios = {name: figures["images_per_second"] / baseline for name, figures in found.items()}
    rows = [
        (
            name,
            f"{figures['images_per_second']:.0f}",
            f"{ratios[name]:.2f}",
            f"{figures['peak_memory_bytes'] / 2**20:.0f}" if "peak_memory_bytes" in figures else "–",
            f"{figures['disk_bytes'] / 2**20:.0f}" if "disk_bytes" in figures else "–",
        )
        for name, figures in found.items()
    ]
    print(
        tabulate(rows, headers=["loader", "images/s", "x torchvision", "RAM, MiB", "on disk, MiB"], tablefmt="github")
    )
    print(json.dumps({"ratios": ratios, "figures": found, "settings": vars(given), "environment": environment()}))


if __name__ == "__main__":
    main()
