"""The front door, as a user meets it."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pytest
import yaml

from distill.cli import main
from distill.command_line import build_parser
from distill.data import DistilledSet
from distill.report.history import read_lines
from tests.running import SMALL, command, guard


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The demo with a tiny budget: two runs under one name."""
    folder = tmp_path_factory.mktemp("experiment")
    small = [text for text in SMALL if not text.startswith("dataset=")]
    arguments = ["experiment=demo", *small, "recover.images_per_class=1", "recover.snapshots=[0,10]", "name=small"]
    arguments += [f"run_root={folder / 'runs'}", f"data_root={folder / 'data'}"]
    done = guard([*command(folder)[:3], "run", *arguments])
    assert done.returncode == 0, done.stderr
    assert "sre2l" in done.stdout
    assert "guard" in done.stdout
    return folder, arguments


def test_an_experiment_is_two_runs_and_one_report(experiment: tuple[Path, list[str]]) -> None:
    folder = experiment[0] / "runs/small"
    assert (folder / "report.md").is_file()
    for arm, regularizer in (("sre2l", "none"), ("guard", "curvature")):
        results = json.loads((folder / arm / "results.json").read_text())
        assert results["regularizer"]["name"] == regularizer
        assert results["teacher"]["clean"]["count"] == 500
        (student,) = results["students"]
        assert [(a["name"], a["epsilon"], a["count"]) for a in student["attacks"]] == [
            ("pgd20", 4, 100),
            ("pgd20", 16, 100),
        ]
        assert student["attacks"][0]["specification"]["attack"] == "PGD"
        assert results["recover"]["bn_loss"] > 0
        assert results["provenance"]["command"]
        assert len(results["config_fingerprint"]) == 64
        assert (folder / arm / "distilled.png").is_file()
        assert yaml.safe_load((folder / arm / "config.yaml").read_text())["regularizer"]["name"] == regularizer


def test_a_second_run_touches_nothing(experiment: tuple[Path, list[str]]) -> None:
    folder, arguments = experiment
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    began = time.monotonic()
    done = guard([*command(folder)[:3], "run", *arguments])
    assert time.monotonic() - began < 60
    assert done.returncode == 0, done.stderr
    stages = [line for line in done.stdout.splitlines() if line.endswith(" complete")]
    assert len(stages) == 10
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_missing_report_is_written_again(experiment: tuple[Path, list[str]]) -> None:
    """As after a kill between the results and the report."""
    folder, arguments = experiment
    lost = [folder / "runs/small" / name for name in ("report.md", "distilled.png", "guard/distilled.png")]
    for path in lost:
        path.unlink()
    assert guard([*command(folder)[:3], "run", *arguments]).returncode == 0
    assert all(path.is_file() for path in lost)


def test_metrics_and_tensorboard_hold_every_stage(experiment: tuple[Path, list[str]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = experiment[0] / "runs/small/guard"
    lines = read_lines(folder)
    assert {line["stage"] for line in lines} == {"teacher", "distilled", "labels", "student", "outcomes"}
    step = next(line for line in lines if line["stage"] == "teacher" and "loss" in line)
    terms = {
        "loss",
        "cross_entropy",
        "penalty",
        "curvature",
        "accuracy",
        "learning_rate",
        "images_per_second",
        "data_wait",
    }
    assert terms <= set(step)
    tags: set[str] = set()
    for shown in ("1_teacher", "2_distilled", "4_student/seed0", "5_outcomes"):
        events = EventAccumulator(str(folder / "tensorboard" / shown)).Reload().Tags()
        tags |= {*events["scalars"], *events["images"], *events["tensors"]}
    wanted = {"1_teacher/curvature", "1_teacher/test/top1", "2_distilled/images", "2_distilled/distilled"}
    wanted |= {"2_distilled/unit_00000/batchnorm_matching", "4_student/loss"}
    wanted |= {"5_outcomes/seed0/pgd20@16", "5_outcomes/attacks/text_summary"}
    assert wanted <= tags


def test_the_distilled_set_is_a_torch_data_set(experiment: tuple[Path, list[str]]) -> None:
    distilled = DistilledSet.open(experiment[0] / "runs/small/guard")
    assert len(distilled) == 20
    image, label = distilled[3]
    assert tuple(image.shape) == (3, 32, 32)
    assert int(label) == 3
    views = list(distilled.views(4, batch_size=8))
    assert [len(images) for images, _ in views] == [8, 8, 4]
    assert views[0][1].shape == (8, 10)


def test_report_formats(experiment: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    runs = str(experiment[0] / "runs/small")
    for form, mark in (("terminal", "pgd20@16"), ("markdown", "|"), ("csv", ",")):
        assert main(["report", runs, "--format", form]) == 0
        assert mark in capsys.readouterr().out
    for page, told in ((runs, "is a folder; give the name"), (f"{__file__}/x.html", "is a file and no folder.")):
        assert main(["report", runs, "--html", page]) == 2
        printed = capsys.readouterr()
        assert told in printed.err
        assert not printed.out


def test_what_is_no_run_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report", "status", "verify", "spectrum", "logs", "cancel"):
        assert main([name, str(tmp_path / "nowhere")]) == 1
        assert f"The run folder {tmp_path / 'nowhere'} does not exist." in capsys.readouterr().err
    for name in ("status", "logs", "cancel"):
        assert main([name, __file__]) == 1
        assert "is a file and no run folder" in capsys.readouterr().err


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from distill.compose import options

    shown = ""
    for name in ("prepare", "squeeze", "recover", "relabel", "evaluate", "run", "config"):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        shown += capsys.readouterr().out
    assert [key for key, _, _ in options() if f"  {key} (" not in shown] == []


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "seed=1", "--debug", "seed=2", "threads=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["threads"]) == (2, 3)
    parsed = build_parser().parse_args(["report", "runs/a", "--format", "csv", "runs/b"])
    assert parsed.runs == ["runs/a", "runs/b"]
    assert build_parser().parse_args(["logs", "runs/a", "--lines", "5", "squeeze"]).stage == "squeeze"
    for given, told in (
        (["config", "seed=1", "--nothing", "x"], "unrecognized arguments: --nothing x"),
        (["logs", "runs/a", "squeeze", "recover"], "unrecognized arguments: recover"),
        (["status", "--watch", "runs/a"], "'runs/a' is no number of seconds; RUN stands before --watch."),
        (["logs", "runs/a", "--lines", "0"], "'0' is no number of lines."),
    ):
        with pytest.raises(SystemExit):
            main(given)
        assert told in capsys.readouterr().err


def test_a_path_that_is_no_utf8_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "dataset.source=/data/\udcff"]) == 2
    assert "is no UTF-8" in capsys.readouterr().err


def test_config_prints_what_is_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "experiment=demo", "arm=guard", "squeeze.epochs=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["regularizer"]["name"], printed["squeeze"]["epochs"], printed["name"]) == (
        "curvature",
        3,
        "demo/guard",
    )
    assert main(["config", "experiment=demo", "arm=guard", "regularizer=gradient_norm", "regularizer.weight=2"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["regularizer"]
    assert (printed["name"], printed["weight"], printed["h"]) == ("gradient_norm", 2, None)
    assert main(["config", "experiment=imagenette_ipc10", "arm=guard", "seed=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["published"]["guard"]["clean"] == 57.93
    assert (
        main(["config", "experiment=imagenette_ipc10", "arm=guard", "recover.ipc=1", "recover.images_per_class=1"]) == 0
    )
    assert yaml.safe_load(capsys.readouterr().out)["published"] == {}
    for other in (
        *("recover.teachers=[runs/b]", "recover.images=set.pt", "method=cda"),
        "squeeze.weights=torchvision:IMAGENET1K_V1",
    ):
        assert main(["config", "experiment=imagenette_ipc10", "arm=guard", other]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["published"] == {}
    assert main(["config", "experiment=demo", "arm=nope"]) == 2
    assert "sre2l, guard" in capsys.readouterr().err


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def documented_commands() -> list[str]:
    """What code blocks of README and of the pages in docs call with options, one line each."""
    pages = "\n".join(page.read_text() for page in PAGES)
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", pages, re.M | re.S)).replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in blocks.splitlines()]
    stages = "prepare|squeeze|recover|relabel|evaluate|run|launch|config"
    found = [line for line in lines if re.match(rf"guard ({stages}) ", line) and "…" not in line]
    return list(dict.fromkeys(found))


def test_every_stage_has_a_page_with_a_command() -> None:
    for name, page in [
        ("prepare", "data"),
        *((stage, stage) for stage in ("squeeze", "recover", "relabel", "evaluate")),
    ]:
        assert f"\nguard {name} " in (ROOT / "docs" / f"{page}.md").read_text(), page


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs/results").glob("*.md"))], ids=lambda page: page.name)
def test_links_of_the_documentation_lead_somewhere(page: Path) -> None:
    """Files that are linked exist, and so do the headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("line", documented_commands())
def test_the_commands_of_the_documentation_are_right(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in shlex.split(line)[2:] if word != "--dry-run"]
    assert main(["config", *words]) == 0, capsys.readouterr().err
