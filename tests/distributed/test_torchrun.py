"""Several processes under torchrun against one process, both with one thread a process."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from distill.compose import compose
from distill.data.catalogue import PreparedSet
from distill.data.loaders import training_loader
from distill.files import load_tensors
from distill.models import Normalize, build_network
from distill.stages.squeeze import build_task
from distill.training.processes import Processes
from distill.training.schedule import build_optimizer
from distill.training.torch_engine import TorchEngine
from launchers.torchrun import threads
from tests.running import SMALL, command, contents, guard, ranks, torchrun

pytestmark = pytest.mark.distributed
FROZEN = ["squeeze.epochs=1", "squeeze.batchnorm=frozen", "squeeze.lr=0.001"]


class InDouble(Normalize):
    """Normalised images in float64."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.double() / 255 - self.mean) / self.std


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done = guard(command(folder, "recover.ipc=3", "evaluate.seeds=[0,1]", "relabel.epochs=9"))
    assert done.returncode == 0, done.stderr
    return folder


def test_recover_relabel_and_evaluate_do_not_depend_on_the_world_size(alone: Path, tmp_path: Path) -> None:
    """With a given teacher two ranks make the same bytes: three units, nine epochs, two students."""
    shutil.copytree(alone / "runs/run/teacher", tmp_path / "runs/run/teacher")
    done = torchrun(2, command(tmp_path, "recover.ipc=3", "evaluate.seeds=[0,1]", "relabel.epochs=9"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("squeeze (teacher) complete") == 1
    mine, theirs = contents(tmp_path / "runs/run"), contents(alone / "runs/run")
    for content in (mine, theirs):
        del content["config.yaml"]
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert {"distilled/unit_00002.safetensors", "labels/epoch_0008.safetensors", "student/seed1.safetensors"} <= set(
        mine
    )
    provenance = json.loads((tmp_path / "runs/run/provenance.json").read_text())
    assert [provenance["distilled"][0][key] for key in ("world_size", "threads")] == [2, 1]


def test_the_smaller_last_batch_is_shared_by_images(alone: Path, tmp_path: Path) -> None:
    """1,297 images leave 17 after 20 batches: ranks with 9 and 8 make the step of one process with such parts."""
    initial = alone / "runs/run/teacher/weights.safetensors"
    options = [*FROZEN, f"squeeze.weights={initial}", "squeeze.schedule=constant", "loader.drop_last=false"]

    def squeeze(name: str, count: int, *more: str) -> dict[str, torch.Tensor]:
        done = ranks(count, command(tmp_path, *options, *more, name=name, stage="squeeze"))
        assert done.returncode == 0, done.stderr
        return load_tensors(tmp_path / "runs" / name / "teacher/weights.safetensors")

    two, micro = squeeze("two", 2), squeeze("micro", 1, "squeeze.accumulation=2")
    without = squeeze("without", 1, "squeeze.accumulation=2", "loader.drop_last=true")
    last = max((micro[name] - without[name]).abs().max().item() for name in two)
    assert max((two[name] - micro[name]).abs().max().item() for name in two) < last / 400


@pytest.mark.parametrize("regularizer", ["curvature", "loss_difference"])
def test_squeeze_is_the_same_training_on_two_ranks(alone: Path, tmp_path: Path, regularizer: str) -> None:
    """20 steps at the same global batch, batch norm frozen: equal to float32 tolerance, and not by standing still."""
    initial = alone / "runs/run/teacher/weights.safetensors"
    options = [*FROZEN, f"squeeze.weights={initial}", f"regularizer={regularizer}"]
    options += ["regularizer.h=1.5", "regularizer.weight=0.5"]

    def squeeze(name: str, count: int, *more: str) -> dict[str, torch.Tensor]:
        done = ranks(count, command(tmp_path, *options, *more, name=name, stage="squeeze"))
        assert done.returncode == 0, done.stderr
        return load_tensors(tmp_path / "runs" / name / "teacher/weights.safetensors")

    def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        return max((one[name] - two[name]).abs().max().item() for name in one)

    one, two = squeeze("one", 1), squeeze("two", 2)
    moved = distance(one, load_tensors(initial))
    assert moved > 5e-3
    # Rounding grows over the steps, and nothing else: in float64 the same comparison gives 3e-16 (test below).
    assert distance(one, two) < min(5e-5, moved / 100)
    if regularizer == "curvature":
        assert distance(squeeze("micro", 1, "squeeze.accumulation=2"), two) < 1e-7


def test_a_divided_batch_is_exact_in_float64(alone: Path) -> None:
    """What ranks and micro-batches rest on: the mean over parts is the whole, penalty included."""
    options = [*SMALL, *FROZEN, "regularizer=curvature", "regularizer.h=1.5", "regularizer.weight=0.5"]
    config = compose([*options, f"data_root={alone / 'data'}"])
    prepared = PreparedSet.open(alone / "data/digits")
    weights = []
    for accumulation in (1, 4):
        network = build_network(config.teacher, 10, 32, 0, "teacher").double()
        task = build_task(config, network)
        task.normalize = InDouble(config.dataset.mean, config.dataset.std)
        loader = training_loader(config, prepared, rank=0, world_size=1, device=torch.device("cpu"))
        engine = TorchEngine(Processes(0, 1, torch.device("cpu")))
        engine.prepare(task, *build_optimizer(network, config.squeeze, 1, len(loader)), accumulation)
        for batch in loader:
            engine.step(batch)
        weights.append(network.state_dict())
    assert engine.step_count == 20
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-10, atol=1e-12)


def test_the_launcher_divides_the_cores(alone: Path, tmp_path: Path) -> None:
    assert [threads(2, 16), threads(3, 8), threads(4, 2)] == [8, 2, 1]
    shutil.copytree(alone / "runs/run/teacher", tmp_path / "runs/run/teacher")
    shutil.copytree(alone / "data", tmp_path / "data")
    guard_command = command(tmp_path, "recover.ipc=3", stage="recover")[3:]
    done = guard([sys.executable, "-m", "launchers.torchrun", "2", *guard_command])
    assert done.returncode == 0, done.stderr
    provenance = json.loads((tmp_path / "runs/run/provenance.json").read_text())
    assert provenance["distilled"][0]["world_size"] == 2
    done = guard([sys.executable, "-m", "launchers.torchrun", "0", "run"])
    assert done.returncode == 2


def test_a_batch_that_does_not_divide_is_refused(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "data", tmp_path / "data")
    done = torchrun(2, command(tmp_path, "squeeze.batch_size=63"))
    assert done.returncode != 0
    assert "squeeze.batch_size=63 does not divide over 2 ranks and 1 micro-batches; 62 and 64 do" in done.stderr
    assert not (tmp_path / "runs").exists()
