"""Faults from outside: one sentence on stderr, the right exit code, no traceback; nothing is lost or overwritten."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import command, contents, guard


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = guard(command(folder), fresh=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence of a failure."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("guard: ")]
    assert len(told) == 1, done.stderr
    return told[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recover.itertions=3", ["Unknown key recover.itertions", "recover.iterations"]),
        ("recover.iterations=many", ["recover.iterations", "'many'", "Integer"]),
        ("recover.iterations=0", ["recover.iterations=0", "recover.start=random_patches"]),
        ("recover.iterations=-1", ["recover.iterations=-1", "at least 0"]),
        ("regularizer=curvatur", ["regularizer=curvatur", "curvature, curvature_norm"]),
        ("teacher.network=convnet", ["teacher.network=convnet", "ResNet"]),
        ("evaluate.schedule=step", ["evaluate.step_epochs"]),
        ("squeeze.ema=1.0", ["squeeze.ema=1.0", "less than 1"]),
        ("name=.", ["name="]),
        ("regularizer.h=3", ["regularizer.h", "regularizer=none"]),
        ("attacks.suite={x: {attack: PGD}}", ["+attacks.suite.x="]),
        ("+attacks.suite.x={attack: Nope}", ["attacks.suite.x.attack=Nope", "PGD"]),
        ("+attacks.suite.pgd20.step=3", ["attacks.suite.pgd20.step", "steps"]),
    ],
)
def test_wrong_options_stop_before_any_work(tmp_path: Path, override: str, words: list[str]) -> None:
    told = sentence(guard(command(tmp_path, override)), 2)
    assert all(word in told for word in words), told
    assert not (tmp_path / "runs").exists()


def test_usage() -> None:
    done = guard([*command(Path())[:3], "nonsense"])
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_missing_data_folder(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    told = sentence(guard(command(tmp_path, f"dataset.source={missing}")), 1)
    assert str(missing) in told
    told = sentence(guard(command(tmp_path, "dataset.name=other", "dataset.provider=folder")), 2)
    assert "dataset.source" in told
    assert not (tmp_path / "runs").exists()


def test_a_corrupt_image_is_named(run: Path, tmp_path: Path) -> None:
    source = run / "source"
    for split, images in (("train", 9), ("test", 3)):
        for label in range(10):
            folder = source / split / str(label)
            folder.mkdir(parents=True)
            found = sorted((run / "data/digits").rglob(f"{split}/{label}/*.png"))[:images]
            assert len(found) == images
            for image in found:
                shutil.copy(image, folder)
    broken = sorted((source / "train/3").glob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:40])
    arguments = command(tmp_path / "other", f"dataset.source={source}", stage="prepare")
    assert broken.name in sentence(guard(arguments), 1)
    assert not (tmp_path / "other/data/digits/manifest.json").exists()
    assert guard([*arguments, "dataset.on_corrupt=skip"]).returncode == 0


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("teacher/weights.safetensors", "recover"),
        ("distilled/unit_00001.safetensors", "relabel"),
        ("labels/epoch_0002.safetensors", "evaluate"),
    ],
)
def test_a_truncated_shard_is_named(run: Path, name: str, stage: str) -> None:
    folder = run / "runs/run"
    shard = folder / name
    shard.write_bytes(shard.read_bytes()[:100])
    before = contents(folder)
    told = sentence(guard(command(run)), 1)
    assert shard.name in told
    assert contents(folder) == before
    # The next stage, asked for alone and not yet made, does not take it for whole either.
    made = {"recover": ["distilled"], "relabel": ["labels"], "evaluate": ["student", "outcomes"]}[stage]
    for each in made:
        shutil.rmtree(folder / each)
    told = sentence(guard(command(run, stage=stage)), 1)
    assert shard.name in told


def test_a_truncated_shard_of_an_unfinished_stage_is_named(run: Path) -> None:
    folder = run / "runs/run"
    (folder / "distilled/manifest.json").unlink()
    shard = folder / "distilled/unit_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    told = sentence(guard(command(run, stage="recover")), 1)
    assert shard.name in told
    shard.unlink()
    assert guard(command(run, stage="recover")).returncode == 0


@pytest.mark.parametrize(
    ("override", "folder"),
    [("squeeze.lr=0.06", "teacher"), ("recover.bn_weight=0.02", "distilled"), ("attacks.epsilon=[8]", "outcomes")],
)
def test_a_changed_config_is_refused_and_named(run: Path, override: str, folder: str) -> None:
    before = contents(run / "runs/run")
    told = sentence(guard(command(run, override)), 1)
    key = override.split("=")[0]
    assert key in told
    assert f"runs/run/{folder}" in told
    assert contents(run / "runs/run") == before


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("evaluate", "relabel.crop_scale=[0.5,1.0]"),
        ("evaluate", "dataset.validation_seed=7"),
        ("relabel", "recover.lr=0.1"),
        ("recover", "dataset.image_size=24"),
    ],
)
def test_a_stage_alone_refuses_inputs_of_another_config(run: Path, stage: str, override: str) -> None:
    """Its own recipe may be the same; what it reads beside it is not."""
    before = contents(run / "runs/run")
    assert override.split("=")[0] in sentence(guard(command(run, override, stage=stage)), 1)
    assert contents(run / "runs/run") == before


def test_initial_weights_are_known_by_their_content(run: Path) -> None:
    weights = run / "weights.safetensors"
    shutil.copy(run / "runs/run/teacher/weights.safetensors", weights)
    taken = ["squeeze.epochs=0", f"squeeze.weights={weights}"]
    assert guard(command(run, *taken, name="taken", stage="squeeze")).returncode == 0
    moved = weights.rename(run / "moved.safetensors")
    taken = ["squeeze.epochs=0", f"squeeze.weights={moved}"]
    assert guard(command(run, *taken, name="taken", stage="squeeze")).returncode == 0
    moved.write_bytes(moved.read_bytes()[:-1] + b"x")
    told = sentence(guard(command(run, *taken, name="taken", stage="squeeze")), 1)
    assert "the weights it was made from" in told


def test_two_processes_do_not_train_in_one_run(run: Path) -> None:
    """What is shared by workers they may make at the same time."""
    kept = (run / "runs/run/teacher").rename(run / "teacher")
    # As long as its input is open.
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX)"
    holder += "; print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", holder, str(run / "runs/run/.lock")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert "Another process is working" in sentence(guard(command(run, stage="squeeze")), 1)
        assert not (run / "runs/run/teacher").exists()
        kept.rename(run / "runs/run/teacher")
        for name in ("distilled", "labels", "student"):
            shutil.rmtree(run / "runs/run" / name)
        for stage in ("recover", "relabel", "evaluate"):
            done = guard(command(run, stage=stage))
            assert done.returncode == 0, done.stderr
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_teacher_is_not_reused(run: Path) -> None:
    weights = run / "runs/run/teacher/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    told = sentence(guard(command(run, f"squeeze.reuse={run / 'runs/run'}", name="other", stage="squeeze")), 1)
    assert "damaged" in told
    assert not (run / "runs/other/teacher/manifest.json").exists()


def test_nan_names_step_and_term(tmp_path: Path) -> None:
    told = sentence(guard(command(tmp_path, "squeeze.lr=1e20", stage="squeeze")), 1)
    assert "cross_entropy became nan at step" in told
    assert not (tmp_path / "runs/run/teacher/manifest.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("tensorboard", ["true", "false"])
def test_a_full_disk_loses_nothing(finished: Path, small_disk: Path, tmp_path: Path, tensorboard: str) -> None:
    shutil.copytree(finished / "data", tmp_path / "data")
    (small_disk / "runs").mkdir()
    (tmp_path / "runs").symlink_to(small_disk / "runs")
    arguments = command(tmp_path, f"monitor.tensorboard={tensorboard}")
    told = sentence(guard(arguments), 1)
    assert "No space is left on the device" in told
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    done = guard(arguments)
    assert done.returncode == 0, done.stderr
    mine, theirs = contents(small_disk / "runs/run"), contents(finished / "runs/run")
    for content in (mine, theirs):
        del content["config.yaml"]
    assert [name for name in theirs if mine.get(name) != theirs[name]] == []


def test_a_full_disk_leaves_nothing_of_a_reused_teacher(run: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(500 * 1024))
    options = [f"squeeze.reuse={run / 'runs/run'}", f"run_root={small_disk}"]
    arguments = command(run, *options, name="other", stage="squeeze")
    told = sentence(guard(arguments), 1)
    assert f"No space is left on the device at {small_disk / 'other'}" in told
    assert not list((small_disk / "other").glob(".teacher*"))
    filler.unlink()
    done = guard(arguments)
    assert done.returncode == 0, done.stderr
    for name in ("recipe.json", "manifest.json", "weights.safetensors"):
        assert (small_disk / "other/teacher" / name).read_bytes() == (run / "runs/run/teacher" / name).read_bytes()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = guard([*command(tmp_path, "recover.iterations=0"), "--debug"])
    assert "Traceback" in done.stderr
