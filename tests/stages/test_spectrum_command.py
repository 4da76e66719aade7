"""``guard spectrum`` on real runs: what it writes, what a kill leaves, what it refuses, what is said of two arms."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.cli import main
from distill.data.catalogue import PreparedSet
from distill.data.decode import decode_square
from distill.errors import ArtifactError
from distill.files import write_json
from distill.models import Normalize, load_teacher
from distill.report.spectra import arms, draw_profiles, profile_figure, profile_statements, read_spectra, spectra_table
from distill.robustness import top_eigenvalues
from distill.robustness.bound import Spectrum
from distill.run_folder import Artifact, Recipe
from tests.running import SMALL, Standstill, start

QUICK = ["squeeze.epochs=1", "recover.iterations=3", "evaluate.labels=hard", "relabel.epochs=2", "evaluate.seeds=[0,1]"]
UNTESTED = [
    "dataset.max_per_class=30",
    "evaluate.max_images=20",
    "attacks=custom",
    "attacks.sanity_images=0",
    "monitor.tensorboard=false",
]
GUARD = ["regularizer=curvature", "regularizer.weight=1", "regularizer.h=1.5"]
NETWORKS = ["teacher", "seed0", "seed1"]
ASKED = ["--images", "4", "--top", "2", "--radii", "0.1,0.5"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment folder with two runs, barely trained, each with two students."""
    folder = tmp_path_factory.mktemp("experiment")
    places = [f"run_root={folder / 'runs'}", f"data_root={folder / 'data'}"]
    for arm, more in (("sre2l", []), ("guard", GUARD)):
        assert main(["run", *SMALL, *QUICK, *UNTESTED, *places, *more, f"name=demo/{arm}"]) == 0
    return folder / "runs/demo"


@pytest.fixture(scope="module")
def measured(experiment: Path) -> tuple[Path, str]:
    """The experiment with its spectra, and what the command printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["spectrum", str(experiment), *ASKED]) == 0
    return experiment, printed.getvalue()


def test_what_is_written(measured: tuple[Path, str]) -> None:
    folder, printed = measured
    for run in (folder / "sre2l", folder / "guard"):
        spectra = read_spectra(run)
        assert list(spectra) == NETWORKS
        for spectrum in spectra.values():
            shapes = [
                getattr(spectrum, name).shape for name in ("eigenvalues", "cosine", "gradient_norm", "loss", "indices")
            ]
            assert shapes == [(4, 2), (4,), (4,), (4,), (4,)]
            assert spectrum.radii.tolist() == [0.1, 0.5]
            assert (np.diff(spectrum.eigenvalues, axis=1) <= 0).all()
            assert (spectrum.eigenvalues[:, 0] > 0).all()
            assert ((spectrum.cosine > 0) & (spectrum.cosine <= 1)).all()
            assert (np.diff(np.c_[spectrum.loss, spectrum.adversarial_loss], axis=1) >= 0).all()
        summary = json.loads((run / "spectrum/spectrum.json").read_text())
        assert (summary["name"], summary["seed"], summary["split"]) == (f"demo/{run.name}", 0, "test")
        assert summary["networks"]["seed1"] == spectra["seed1"].summary()
        assert f"demo/{run.name}" in printed
    assert Image.open(folder / "spectrum.png").size[0] > 1000
    assert "Students: the profile of" in printed
    assert "% of the sorted positions (mean ± sample deviation over 2 pairs of equal seeds)." in printed
    assert printed == "".join(
        [f"{folder / arm}: spectrum complete\n" for arm in ("guard", "sre2l")]
        + [f"{spectra_table([folder / 'guard', folder / 'sre2l'])}\n\n"]
        + [f"{text}\n" for text in profile_statements([folder / "guard", folder / "sre2l"])]
        + [f"Sorted profiles: {folder / 'spectrum.png'}\n"]
    )


def test_it_is_the_teacher_around_normalised_test_images(measured: tuple[Path, str]) -> None:
    run = measured[0] / "guard"
    spectrum = read_spectra(run)["teacher"]
    samples = PreparedSet.open(measured[0].parent.parent / "data/digits").samples("test")
    assert sorted(set(samples.labels[spectrum.indices].tolist())) == sorted(samples.labels[spectrum.indices].tolist())
    pixels = torch.stack([torch.as_tensor(decode_square(samples.path(int(n)), 32)) for n in spectrum.indices])
    config = json.loads((run / "spectrum/recipe.json").read_text())["recipe"]["options"]
    images = Normalize(config["dataset.mean"], config["dataset.std"])(pixels)
    labels = torch.from_numpy(samples.labels[spectrum.indices])
    found = top_eigenvalues(load_teacher(run / "teacher"), images, labels, 2)
    assert spectrum.eigenvalues == pytest.approx(found.numpy(), rel=1e-3, abs=1e-4 * float(found.max()))


def test_nothing_is_made_twice(measured: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(measured[0] / arm) for arm in ("sre2l", "guard")]
    before = {path: path.stat().st_mtime_ns for run in runs for path in Path(run).rglob("*")}
    (measured[0] / "spectrum.png").unlink()
    assert main(["spectrum", *runs, *ASKED]) == 0
    assert {path: path.stat().st_mtime_ns for run in runs for path in Path(run).rglob("*")} == before
    assert "image/s" not in capsys.readouterr().err
    assert (measured[0] / "spectrum.png").is_file(), "runs that are given by themselves have the figure beside them"


def test_killed_and_continued(measured: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "demo/guard"
    shutil.copytree(measured[0] / "guard", run, ignore=shutil.ignore_patterns("spectrum"))
    command = [sys.executable, "-m", "distill", "spectrum", str(run), *ASKED]
    limit = Standstill(tmp_path)
    limit.before("spectrum/seed1.safetensors")
    with (tmp_path / "log").open("w") as log:
        process = start(command, stdout=log, stderr=log, new_session=True, **limit.variables)
        deadline = time.monotonic() + 120
        while not (run / "spectrum/teacher.safetensors").is_file():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "spectrum/manifest.json").exists()
    assert read_spectra(run) == {}
    made = (run / "spectrum/teacher.safetensors").stat().st_mtime_ns
    (run / "spectrum/.seed0.safetensors.1-0.tmp").write_bytes(b"half")
    assert main(command[3:]) == 0
    progress = capsys.readouterr().err
    assert (run / "spectrum/teacher.safetensors").stat().st_mtime_ns == made
    assert "teacher: 0/" not in progress
    assert "seed1: 4/4 image" in progress
    whole = {path.name: path.read_bytes() for path in (measured[0] / "guard/spectrum").iterdir()}
    assert {path.name: path.read_bytes() for path in (run / "spectrum").iterdir()} == whole


@pytest.fixture
def copied(measured: tuple[Path, str], tmp_path: Path) -> Path:
    """A run of its own, with its spectrum."""
    shutil.copytree(measured[0] / "guard", tmp_path / "guard")
    return tmp_path / "guard"


def test_verify_reads_it_too(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copied)]) == 0
    assert f"{copied / 'spectrum'}: 4 files" in capsys.readouterr().out
    path = copied / "spectrum/seed1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(copied)]) == 1
    manifest = copied / "spectrum/manifest.json"
    assert (
        capsys.readouterr().err
        == f"guard: {path} is not what {manifest} says; remove both and run the same command again.\n"
    )
    shutil.rmtree(copied / "spectrum")
    assert main(["verify", str(copied)]) == 0
    assert "spectrum" not in capsys.readouterr().out


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must fail says, one sentence."""
    code = main(["spectrum", *arguments])
    assert code in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("guard: ")]
    return line


def test_other_options_and_inputs_are_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, str(copied), *ASKED, "--images", "7", "--precision", "float64")
    assert "--images (was 4, now 7); --precision (was 'float32', now 'float64')" in line
    assert "Give the same options, or remove that folder." in line
    manifest = copied / "teacher/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "fingerprint": "0" * 64}))
    assert "the teacher it was made from" in said(capsys, str(copied), *ASKED)


def test_what_is_missing_or_damaged_is_told(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data-root says where it lies now" in said(capsys, str(copied), *ASKED, "--data-root", str(tmp_path))
    assert main(["spectrum", str(copied), *ASKED]) == 0
    capsys.readouterr()
    file = copied / "spectrum/seed0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert f"{file} has {len(whole) - 8} bytes instead of {len(whole)}" in said(capsys, str(copied), *ASKED)
    file.write_bytes(whole[:-8] + b"\xff" * 7)
    (copied / "spectrum/manifest.json").unlink()
    assert f"{file} is no spectrum" in said(capsys, str(copied), *ASKED)
    (copied / "student/manifest.json").unlink()
    assert "has no complete student; guard evaluate makes it" in said(capsys, str(copied), *ASKED)
    config = copied / "config.yaml"
    config.write_text(config.read_text() + "unheard_of: 1\n")
    assert "config.yaml is no configuration of this version (Key 'unheard_of'" in said(capsys, str(copied))
    config.write_bytes(b"\xff")
    assert "config.yaml is no configuration of this version ('utf-8' codec" in said(capsys, str(copied))
    config.unlink()
    (copied / "results.json").write_text("{}")
    assert "has no config.yaml" in said(capsys, str(copied))
    assert "does not exist" in said(capsys, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "-1"], "--images -1 must be at least 0."),
        (["--top", "0"], "--top 0 must be at least 1."),
        (["--top", "3073"], "--top 3073 must be at most 3072, the values of an image"),
        (["--radii", "0.1,wide"], "--radii 0.1,wide must be numbers with commas between them"),
        (["--radii", "0.5,0.1"], "radii=0.5,0.1 must be positive and ascending."),
    ],
)
def test_what_makes_no_sense_is_told(
    experiment: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    before = sorted((experiment / "sre2l").rglob("*"))
    assert sentence in said(capsys, str(experiment / "sre2l"), *arguments)
    assert sorted((experiment / "sre2l").rglob("*")) == before


def test_double_precision_agrees(experiment: Path, tmp_path: Path) -> None:
    """On training images, where these are asked for."""
    run = tmp_path / "sre2l"
    shutil.copytree(experiment / "sre2l", run, ignore=shutil.ignore_patterns("spectrum"))
    asked = ["--images", "2", "--radii", "0.5"]
    assert main(["spectrum", str(run), *asked, "--split", "train"]) == 0
    single = read_spectra(run)
    shutil.rmtree(run / "spectrum")
    assert main(["spectrum", str(run), *asked, "--split", "train", "--precision", "float64"]) == 0
    for name, double in read_spectra(run).items():
        assert np.array_equal(single[name].indices, double.indices)
        for field in ("eigenvalues", "loss", "gradient_norm", "adversarial_loss"):
            mine, theirs = getattr(single[name], field), getattr(double, field)
            assert mine == pytest.approx(theirs, rel=1e-3), field
            assert not np.array_equal(mine, theirs), field


def made_run(folder: Path, name: str, seed: int, curves: dict[str, list[float]]) -> Path:
    """A run folder with nothing but a complete spectrum of these λ₁."""
    run = folder / name
    artifact = Artifact(run / "spectrum", "spectrum", Recipe({"seed": seed}))
    artifact.begin()
    spectra = {}
    for network, values in curves.items():
        first = np.array(values)
        one, count = np.ones(len(first)), np.arange(len(first))
        spectra[network] = Spectrum(first[:, None], one, one, one, count, np.array([0.5]), 2 * one[:, None])
        spectra[network].write(run / f"spectrum/{network}.safetensors")
    summaries = {network: spectrum.summary() for network, spectrum in spectra.items()}
    write_json(run / "spectrum/spectrum.json", {"name": name, "seed": seed, "networks": summaries})
    artifact.finish(networks=list(curves))
    return run


def by_position(corners: np.ndarray) -> list[np.ndarray]:
    """The heights of a band at each of its positions."""
    return [corners[corners[:, 0] == position, 1] for position in np.unique(corners[:, 0])]


def test_the_statement_on_two_arms(tmp_path: Path) -> None:
    """Sorted first; equal values do not lie below; pairs are of equal seeds, whatever the order."""
    runs = []
    for seed, low in ((2, [4.0, 0.0, 1.0, 2.0]), (0, [3.0, 0.5, 1.0, 2.0]), (1, [5.0, 0.5, 1.0, 2.0])):
        runs.append(made_run(tmp_path, f"demo_{seed}/guard", seed, {"teacher": [1, 1, 1, 1], "seed0": low}))
    for seed in (0, 1, 2, 7):
        curves = {"teacher": [2.0, 2.0, 2.0, 1.0], "seed0": [1.0, 4.0, 2.0, 3.0]}
        runs.append(made_run(tmp_path, f"demo_{seed}/sre2l", seed, curves))
    students, teachers = profile_statements(runs)
    # Below 4, 3, 2, 1 lie of 4, 2, 1, 0 three, of 3, 2, 1, ½ four and of 5, 2, 1, ½ three.
    assert students == (
        "Students: the profile of guard lies below sre2l's at 83.3 ± 14.4 % of the sorted positions "
        "(mean ± sample deviation over 3 pairs of equal seeds)."
    )
    assert "Teachers: the profile of guard lies below sre2l's at 75.0 ± 0.0 %" in teachers
    assert [(arm.name, len(arm.of(True))) for arm in arms(runs)] == [("guard", 3), ("sre2l", 4)]
    draw_profiles(runs, tmp_path / "all.png")
    colours = np.asarray(Image.open(io.BytesIO((tmp_path / "all.png").read_bytes())).convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (colours == colour).all(axis=1).any(), "each arm has its curve"
    students_panel, _ = profile_figure(runs).axes
    (curve, _), (band, *_) = students_panel.lines, students_panel.collections
    assert curve.get_ydata() == pytest.approx([4, 2, 1, 1 / 3]), "the mean of the three sorted profiles"
    corners = band.get_paths()[0].vertices
    ranges = {(each.min(), each.max()) for each in by_position(corners)}
    assert ranges == {(3, 5), (2, 2), (1, 1), (0, 0.5)}


def test_arms_that_are_not_seeds_of_one_another(tmp_path: Path) -> None:
    """Two runs of one name and seed differ in something else: they are no repetitions."""
    runs = [made_run(tmp_path, f"grid_{weight}/guard", 0, {"teacher": [1.0], "seed0": [weight]}) for weight in (1, 3)]
    assert [arm.name for arm in arms(runs)] == ["grid_1/guard", "grid_3/guard"]
    assert (
        "grid_1/guard lies below grid_3/guard's at 100.0 % of the sorted positions (one pair)."
        in (profile_statements(runs)[0])
    )
    with pytest.raises(ArtifactError, match="Two runs of seed 0 are called grid_1/guard"):
        arms([runs[0], runs[0]])
    longer = made_run(tmp_path, "other/sre2l", 0, {"teacher": [1.0, 2.0], "seed0": [2.0, 3.0]})
    with pytest.raises(ArtifactError, match="the same --images"):
        profile_statements([runs[0], longer])


def test_no_direction_is_no_damage(tmp_path: Path) -> None:
    """A NaN cosine stays out of the means, and out of JSON, which has no NaN."""
    flat = Spectrum(
        np.zeros((2, 1)),
        np.array([np.nan, 0.5]),
        np.zeros(2),
        np.zeros(2),
        np.arange(2),
        np.array([0.1, 0.2]),
        np.zeros((2, 2)),
    )
    flat.write(tmp_path / "flat.safetensors")
    again = Spectrum.read(tmp_path / "flat.safetensors")
    assert np.array_equal(again.cosine, flat.cosine, equal_nan=True)
    assert (again.indices.dtype, again.loss.dtype) == (np.int64, np.float64)
    assert again.mean_cosine == 0.5
    assert json.dumps(again.summary(), allow_nan=False)
