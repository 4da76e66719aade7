"""How far the loaders agree: accuracy of one teacher on the same test images, and the pixels that it sees.

    python -m benchmarks.agreement [--run runs/imagenette_smoke] [key=value …]

Without a run a small teacher of scikit-learn's digits is trained. The options of the run are those of its
``config.yaml``; further ``key=value`` change them, such as ``dataset.stored_size=0``, with which the loaders resize the
images themselves.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tabulate import tabulate
from torch import nn

from data_prep import prepare
from distill import pipeline
from distill.compose import compose
from distill.config import Config
from distill.data.batch import Batch, Loader
from distill.data.loaders import test_loader
from distill.models import Normalize, load_teacher
from distill.provenance import environment
from distill.robustness.runner import top_accuracy

LOADERS = {
    "folder": ["loader=folder"],
    "ffcv raw": ["loader=ffcv", "format.mode=raw"],
    "ffcv proportion 0.1": ["loader=ffcv", "format.mode=proportion"],
    "ffcv jpg": ["loader=ffcv", "format.mode=jpg"],
    "dali": ["loader=dali"],
}


def options_of(run: Path) -> list[str]:
    """What makes the data of a run, as overrides."""
    node = OmegaConf.load(run / "config.yaml")
    keys = ("name", "num_classes", "image_size", "stored_size", "max_per_class", "validation_per_class", "mean", "std")
    return [f"data_root={node.data_root}", *(f"dataset.{key}={node.dataset[key]}".replace(" ", "") for key in keys)]


def loader_of(config: Config) -> Loader[Batch]:
    """The test images of a configuration, prepared if need be."""
    return test_loader(config, prepare(config), split="test", batch_size=250)


def difference(mine: Loader[Batch], theirs: Loader[Batch]) -> float:
    """Mean absolute difference of the pixels, of 255."""
    total, count = 0.0, 0
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        total += float((a.images.double() - b.images.double()).abs().sum())
        count += a.images.numel()
    return total / count


def small_run(folder: Path) -> Path:
    """A run with a teacher of scikit-learn's digits, trained in seconds."""
    network = ["teacher.network=resnet10", "teacher.stem=stride2", "teacher.width=8"]
    training = ["squeeze.epochs=4", "squeeze.batch_size=64", "squeeze.lr=0.05", "squeeze.crop=padded"]
    places = [f"run_root={folder}", f"data_root={folder / 'data'}", "name=digits"]
    config = compose(["dataset=digits", *network, *training, *places])
    pipeline.run([config], "squeeze", prepare)
    return folder / "digits"


def measure(run: Path, options: list[str]) -> dict[str, dict[str, float]]:
    """Accuracy in per cent and mean pixel difference from the folder loader, of 255, with every loader."""
    common = ["dataset=imagenette", "dataset.provider=folder", *options]
    config = compose([*common, *LOADERS["folder"]])
    reference = loader_of(config)
    model = nn.Sequential(Normalize(config.dataset.mean, config.dataset.std), load_teacher(run / "teacher"))
    figures = {}
    for name, choice in LOADERS.items():
        loader = loader_of(compose([*common, *choice]))
        accuracy = top_accuracy(model, loader)
        figures[name] = {**accuracy.as_json(), "pixel_difference": difference(loader, reference)}
    return figures


def main() -> None:
    """Measure, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="run folder with a teacher")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or small_run(Path(folder))
        figures = measure(run, [*options_of(run), *given.overrides])
    rows = [(name, *figures[name].values()) for name in figures]
    print(tabulate(rows, headers=["loader", *figures["folder"]], tablefmt="github", floatfmt=".3f"))
    print(json.dumps({"figures": figures, "settings": vars(given), "environment": environment()}, default=str))


if __name__ == "__main__":
    main()
