"""Engines and world sizes agree: real gloo processes on the same global batches, compared with one plain process.

Four processes join groups of 2, 1 and 4 and go through everything (``engine_worker``); the tests read what they wrote.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.files import load_tensors
from distill.training.engine import Engine
from distill.training.processes import Processes, processes
from tests.distributed.training_steps import ENGINES, REGULARIZERS, make, shares, weights
from tests.running import command, free_port, guard, start, torchrun

pytestmark = pytest.mark.distributed
WORLD_SIZES = (1, 2, 4)
TOLERANCE = {"float64": 1e-9, "float32": 1e-6}
"""Relative norm of the difference of all parameters after five steps; measured: 2e-16 and 1e-8."""
BATCHNORMS = [
    *itertools.product(REGULARIZERS, ["frozen"], TOLERANCE),
    ("curvature", "sync", "float64"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engines")
    ports = [free_port() for _ in WORLD_SIZES]
    surroundings = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(max(WORLD_SIZES)):
            arguments = [sys.executable, "-m", "tests.distributed.engine_worker", str(folder), str(rank), *ports]
            output = stack.enter_context(open(folder / f"{rank}.txt", "w"))
            ranks.append(start(arguments, stdout=output, stderr=output, **surroundings))
            stack.callback(ranks[-1].kill)
        # When one has failed, the others would wait for it.
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.1)
    for number, rank in enumerate(ranks):
        assert not rank.wait() or rank.returncode == -signal.SIGKILL, (folder / f"{number}.txt").read_text()
    return folder


def flat(path: Path) -> Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(load_tensors(path).items())])


def difference(one: Path, two: Path) -> float:
    """‖θ₁ − θ₂‖ / ‖θ₂‖ over all parameters and running statistics."""
    return ((flat(one) - flat(two)).norm() / flat(two).norm()).item()


def found(root: Path, world_size: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / str(world_size) / "found.json").read_text())
    return content


@pytest.mark.parametrize(("regularizer", "batchnorm", "dtype"), BATCHNORMS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_five_steps_are_those_of_one_plain_process(
    root: Path, world_size: int, engine: str, regularizer: str, batchnorm: str, dtype: str
) -> None:
    name = f"{regularizer}-{batchnorm}-{dtype}"
    own, plain = root / str(world_size) / f"{engine}-{name}.safetensors", root / f"1/torch-{name}.safetensors"
    assert difference(own, plain) < TOLERANCE[dtype]
    said = found(root, world_size)
    assert all(said[f"ranks equal: {engine}-{name}"])
    (alone,) = found(root, 1)[f"terms: torch-{name}"]
    for terms in said[f"terms: {engine}-{name}"]:
        for mine, theirs in zip(terms, alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_statistics_keep_their_bits(root: Path, engine: str) -> None:
    """Four ranks, the last batch shared unequally: no mean over ranks may round."""
    initial = make(Processes(0, 1, torch.device("cpu")), batchnorm="frozen")
    kept = load_tensors(root / f"4/{engine}-none-frozen-float32.safetensors")
    for name, value in weights(initial).items():
        assert "running" not in name or torch.equal(value, kept[name]), name


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(REGULARIZERS, 2)))
def test_five_steps_go_far_enough_to_tell_regularizers_apart(root: Path, one: str, two: str) -> None:
    paths = [root / f"1/torch-{name}-frozen-float64.safetensors" for name in (one, two)]
    assert difference(*paths) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_micro_batches_weigh_as_many_images_as_they_have(root: Path, world_size: int, engine: str) -> None:
    """Three of them, of which a small last batch makes fewer, and not equally many on each rank."""
    parts = root / str(world_size) / f"{engine}-accumulation.safetensors"
    assert difference(parts, root / "1/whole-batches.safetensors") < 1e-9


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_micro_batches_share_statistics_over_ranks(root: Path, world_size: int) -> None:
    """Every rank must come to as many of the layers, or they would wait for ever."""
    paths = [root / f"{world_size}/{engine}-sync-accumulation.safetensors" for engine in ("torch", "deepspeed_zero2")]
    assert difference(*paths) < 1e-9


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_training_has_the_same_bits(root: Path, world_size: int, engine: str) -> None:
    entries = {key: value for key, value in found(root, world_size).items() if key.startswith(f"bits: {engine} ")}
    assert len(entries) == 2
    for ranks in entries.values():
        assert [same for same, _, _ in ranks] == [True] * world_size
        assert all(steps == 5 for _, steps, _ in ranks)


@pytest.mark.parametrize(("optimizer", "tolerance"), [("sgd", 1e-6), ("adamw", 1e-9)])
def test_a_checkpoint_goes_on_at_another_world_size_and_engine(root: Path, optimizer: str, tolerance: float) -> None:
    """Two ranks with ZeRO 2, then one plain process, then four ranks with ZeRO 1: as if nothing had happened."""
    end, undisturbed = root / f"4/journey-{optimizer}.safetensors", root / f"1/undisturbed-{optimizer}.safetensors"
    assert difference(end, undisturbed) < tolerance
    assert difference(root / f"2/journey-{optimizer}.safetensors", undisturbed) > 100 * tolerance
    assert all(found(root, 4)[f"ranks equal: journey-{optimizer}"])


@pytest.mark.parametrize("stage", [1, 2])
def test_what_a_file_says_of_placement_changes_nothing(root: Path, stage: int) -> None:
    """Three steps with every such key, and two more with the other stage and none of them."""
    plain = root / "1/torch-curvature-frozen-float64.safetensors"
    assert difference(root / f"2/placement{stage}.safetensors", plain) < 1e-9


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nan_on_one_rank_stops_all_before_the_step(root: Path, world_size: int, engine: str) -> None:
    ranks = found(root, world_size)[f"nan: {engine}"]
    assert len({said for said, _, _ in ranks}) == 1
    for said, kept, moves_again in ranks:
        assert said.startswith("extra became nan at step 1")
        assert kept
        assert moves_again


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nan_in_the_gradient_of_one_rank_stops_all(root: Path, world_size: int, engine: str) -> None:
    """The loss itself is finite."""
    for said, kept in found(root, world_size)[f"nan gradient: {engine}"]:
        assert said.startswith("parameter_gradient became nan at step 1")
        assert kept


def test_images_per_second_are_the_same_on_every_rank(root: Path) -> None:
    """Eight images of each, over the longer of their times."""
    first, second = found(root, 2)["health"]
    assert first == second
    assert first < 16 / 0.6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_input_gradients_inside_forward_reach_the_parameters(root: Path, world_size: int, engine: str) -> None:
    inner = root / str(world_size) / f"{engine}-inner.safetensors"
    assert difference(inner, root / "1/torch-inner.safetensors") < TOLERANCE["float32"]
    assert difference(inner, root / "1/torch-none-frozen-float32.safetensors") > 1e-4


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "torch"])
def test_the_default_clipping_of_deepspeed_is_not_in_force(root: Path, engine: str) -> None:
    said = found(root, 1)
    (plain,), (ours,), (default,) = (
        said[f"clipping: {name}"] for name in ("torch ours", f"{engine} ours", f"{engine} default")
    )
    assert plain[0] > 100
    assert ours == pytest.approx(plain, rel=1e-5)
    # The first step of SGD moves by learning rate times the norm of the gradient, which the default cuts to 1.
    assert default[1] == pytest.approx(1e-4, rel=0.01)


def test_deepspeed_leaves_the_process_as_it_was_and_is_quiet(root: Path) -> None:
    assert found(root, 2)["changed"] == [[], []]
    for rank in range(max(WORLD_SIZES)):
        assert (root / f"{rank}.txt").read_text() == ""


def test_batch_norm_over_ranks_is_that_of_the_whole_batch(root: Path) -> None:
    """Five and two images, in float64: outputs, gradients and running statistics."""
    for ranks in found(root, 2)["batch norm"]:
        assert set(ranks) == {"momentum 0.1", "momentum None", "plain", "eval"}
        for name, differences in ranks.items():
            assert max(differences.values()) < 1e-12, (name, differences)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_gradient_can_be_taken_outside_the_forward_pass(engine: str) -> None:
    """A penalty on what the engine gives back would bypass DeepSpeed's hooks: there is nothing to take it from."""
    if engine != "torch":
        pytest.importorskip("deepspeed")
    public = {name for name in vars(Engine) if not name.startswith("_")} | {"step_count"}
    with processes("cpu", 1) as group:
        made = make(group, engine, "curvature")
        assert list(inspect.signature(made.step).parameters) == ["batch"]
        methods = {name for name, value in inspect.getmembers(made) if not name.startswith("_") and callable(value)}
        # The task is the user's own module; what wraps it is not to be had.
        assert methods - {"task"} <= public
        for name, value in vars(made).items():
            assert name.startswith("_") or not type(value).__module__.startswith("deepspeed"), name
            assert name.startswith("_") or not isinstance(value, nn.parallel.DistributedDataParallel), name
        batch: Batch = next(shares(group))
        for name, term in made.step(batch).items():
            assert not term.requires_grad, name
            with pytest.raises(RuntimeError, match="does not require grad"):
                torch.autograd.grad(term, list(made.task.parameters()))
        assert not any(value.requires_grad for value in weights(made).values())


def test_squeeze_by_torchrun_with_zero_makes_the_teacher_of_one_process(tmp_path: Path) -> None:
    """The whole command on two ranks, with batch norm over both and checkpoints on the way.

    Three steps, for from scratch rounding grows: after 20 steps it is 1e-4 in float32, and 1e-15 in float64.
    """
    pytest.importorskip("deepspeed")
    options = ["dataset.max_per_class=20", "squeeze.epochs=1", "squeeze.batchnorm=sync", "regularizer=curvature"]
    options += ["regularizer.h=0.4", "regularizer.weight=0.1", "squeeze.lr=0.001"]
    plain = guard(command(tmp_path, *options, name="plain", stage="squeeze"))
    assert plain.returncode == 0, plain.stderr
    done = torchrun(2, command(tmp_path, *options, "engine=deepspeed_zero2", name="zero", stage="squeeze"))
    assert done.returncode == 0, done.stderr
    assert "DeepSpeed" not in done.stdout + done.stderr
    teachers = [tmp_path / "runs" / name / "teacher/weights.safetensors" for name in ("zero", "plain")]
    assert difference(*teachers) < 1e-5
    (made,) = json.loads((tmp_path / "runs/zero/provenance.json").read_text())["teacher"]
    assert (made["engine"], made["world_size"]) == ("deepspeed_zero2", 2)
    assert made["versions"]["deepspeed"] == metadata.version("deepspeed")
