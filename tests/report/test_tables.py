"""Runs side by side, on the terminal, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill import report
from distill.errors import ArtifactError
from distill.files import digest, read_json, write_json
from distill.report.comparison import compare_runs
from distill.report.runs import run_folders
from distill.report.sections import leader
from distill.run_folder import Artifact, Recipe
from distill.sharing.status import describe
from distill.sharing.verify import verify
from tests.report.conftest import RunMaker, network

PLAIN = {"name": "none", "weight": None, "options": {}}
AS_EVER = {"every": 1, "fraction": 1.0, "gradients": "auto", "h_scaling": True}
CURVATURE = {"name": "curvature", "weight": 1.0, "h": 1.5, "steps": None, "options": {}} | AS_EVER


def students(clean: list[float], at8: list[float], at16: list[float]) -> list[dict[str, Any]]:
    return [
        network(seed, c, {("pgd20", 8.0): a, ("pgd20", 16.0): b})
        for seed, (c, a, b) in enumerate(zip(clean, at8, at16, strict=True))
    ]


@pytest.fixture
def experiment(make_run: RunMaker) -> Path:
    make_run("demo/sre2l", PLAIN, students([0.996, 0.994], [0.875, 0.855], [0.291, 0.311]))
    guard = students([0.998, 0.992], [0.930, 0.932], [0.560, 0.564])
    published = {"guard": {"clean": 57.93, "pgd20": 23.87, "pgd20@16": 12.5}}
    return make_run("demo/guard", CURVATURE, guard, published=published).parent


def test_two_runs_on_a_terminal(experiment: Path) -> None:
    text = compare_runs([experiment]).terminal()
    assert "mean ± sample standard deviation over students" in text.splitlines()[0]
    assert "data digits, method sre2l, IPC 10, split test, students 2, images 500" in text
    lines = {(line.split()[0], "teacher" in line): line for line in text.splitlines()[2:] if line}
    guard = lines[("guard", False)]
    assert "curvature λ=1 h=1.5" in guard
    assert "99.5 ± 0.4 (paper 57.93)" in guard
    assert "93.1 ± 0.1 " in guard, "the paper's pgd20 is at 1/255, not at 8/255"
    assert "56.2 ± 0.3 (paper 12.5)" in guard
    assert "99.1" in lines[("guard", True)]
    assert "60.0" in lines[("guard", True)]
    assert "±" not in lines[("guard", True)]


def test_markdown_has_the_best_student_and_teacher_in_bold(experiment: Path) -> None:
    rows = [
        line
        for line in compare_runs([experiment / "sre2l", experiment / "guard"]).markdown().splitlines()
        if "|" in line
    ]
    header, body = (
        [c.strip() for c in rows[0].split("|")[1:-1]],
        [[c.strip() for c in r.split("|")[1:-1]] for r in rows[2:]],
    )
    assert header == ["run", "regularizer", "network", "clean", "pgd20@8", "pgd20@16", "RR", "I-RR", "BN loss"]
    assert [(row[0], row[2]) for row in body] == [
        *(("sre2l", "student"), ("guard", "student"), ("sre2l", "teacher"), ("guard", "teacher")),
    ]
    assert [row[4] for row in body] == ["86.5 ± 1.4", "**93.1 ± 0.1**", "**90.0**", "**90.0**"]
    assert body[1][5] == "**56.2 ± 0.3** (paper 12.5)"
    assert body[0][8] == "**5.10**"
    assert body[2][8] == "–"


def test_csv_can_be_read_back(experiment: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(compare_runs([experiment]).csv())))
    assert len(rows) == 4
    guard = rows[0]
    assert (guard["run"], guard["regularizer"], guard["network"]) == ("guard", "curvature λ=1 h=1.5", "student")
    assert float(guard["pgd20@16"]) == pytest.approx(56.2)
    assert float(guard["pgd20@16 sd"]) == pytest.approx(0.2828, abs=1e-3)
    assert (guard["clean published"], guard["pgd20@8 published"], guard["data"]) == ("57.93", "", "digits")
    assert rows[2]["pgd20@16 sd"] == ""


def test_what_differs_gets_a_column(make_run: RunMaker) -> None:
    one = make_run("ipc10", PLAIN, [network(0, 0.5, {("cw", None): 0.4})], teacher=None)
    two = make_run("ipc50", PLAIN, [network(0, 0.6, {("mim", 1.0): 0.6})], ipc=50, teacher=None, recover={})
    table = compare_runs([one, two])
    header = table.markdown().splitlines()[2]
    assert [c.strip() for c in header.split("|")[1:-1]] == [
        *("run", "regularizer", "network", "IPC", "clean", "cw", "mim@1", "RR", "I-RR", "BN loss"),
    ]
    assert "IPC" not in table.caption
    assert "±" not in table.caption
    # What a teacher makes of distilled images is no test of it.
    assert [(row.run, row.network) for row in table.rows] == [("ipc10", "student"), ("ipc50", "student")]
    assert "RR" not in table.rows[1].cells, "clean = attacked: undefined"


def test_the_best_is_that_of_one_data_set(make_run: RunMaker) -> None:
    runs = [
        make_run(f"{data}/{name}", PLAIN, [network(0, clean, {("mim", 1.0): clean / 2})], teacher=None, dataset=data)
        for data, name, clean in (
            ("digits", "a", 0.9),
            ("digits", "b", 0.8),
            ("cifar10", "c", 0.4),
            ("cifar10", "d", 0.5),
        )
    ]
    table = compare_runs(runs)
    assert [table.is_best(row, "clean") for row in table.rows] == [True, False, False, True]
    assert leader(table) == ""
    assert leader(compare_runs(runs[:2])) == (
        "Students under the hardest attack, mim@1: a 45.0 %, b 40.0 %. Without attack: a 90.0 %, b 80.0 %."
    )


def test_repetitions_in_every_format(make_run: RunMaker) -> None:
    def run(seed: int, clean: float, forward: float) -> Path:
        student = network(0, clean, {("pgd20", 8.0): clean / 2})
        student["attacks"][0]["effort"] = {"forward": forward, "backward": 10.0}
        student["sanity"] = {"flags": ["gradient masking suspected: oh"] * (seed == 1), "checks": []}
        return make_run(f"s{seed}/guard", CURVATURE, [student], teacher=None, seed=seed, recover={"bn_loss": 5 + seed})

    table = compare_runs([run(0, 0.5, 20), run(1, 0.7, 40)])
    (line,) = [line for line in table.terminal().splitlines() if line.startswith("guard (2 runs)  ")]
    assert re.search(
        r"student +60\.0 ± 14\.1 +30\.0 ± 7\.1 +0\.00 ± 0\.00 +0\.75 ± 0\.00 +5\.50 ± 0\.71 +30 / 10 +1$", line
    )
    assert table.terminal().endswith("guard (2 runs), student: gradient masking suspected: oh")
    assert "| guard (2 runs) |" in table.markdown()
    (row,) = csv.DictReader(io.StringIO(table.csv()))
    assert (row["run"], row["runs"], row["forward passes"], row["backward passes"]) == ("guard", "2", "30.0", "10.0")
    assert (row["flags"], row["BN loss"], row["BN loss sd"]) == ("gradient masking suspected: oh", "5.5", "0.707107")


def test_a_ratio_of_fewer_students_says_of_how_many(make_run: RunMaker) -> None:
    """RR is not defined for a student that no attack harms."""
    run = make_run("whole", PLAIN, students([0.9, 0.9, 0.9], [0.8, 0.9, 0.8], [0.7, 0.9, 0.7]))
    cells = compare_runs([run]).rows[0].cells
    assert cells["RR"].text() == "0.25 ± 0.00 (2 of 3)"
    assert (cells["I-RR"].few, cells["clean"].few) == ("", "")
    repeated = [
        make_run(f"s{seed}/x", PLAIN, students([0.9], [a], [0.7]), seed=seed) for seed, a in enumerate((0.9, 0.8))
    ]
    repeated += [make_run("s2/x", PLAIN, students([0.9], [0.9], [0.9]), seed=2, recover={"bn_loss": None})]
    (row, *_) = compare_runs(repeated).rows
    assert row.cells["BN loss"].few == "2 of 3"
    assert (row.runs, row.cells["RR"].few, row.cells["I-RR"].few) == (3, "2 of 3", "")


def test_runs_of_the_same_last_name_keep_their_whole_name(make_run: RunMaker) -> None:
    student = [network(0, 0.5, {})]
    table = compare_runs([make_run("a/guard", CURVATURE, student), make_run("b/guard", CURVATURE, student)])
    assert [row.run for row in table.rows] == ["a/guard", "b/guard"] * 2


def test_different_attacks_under_one_name_are_remarked(make_run: RunMaker) -> None:
    one = make_run("one", PLAIN, [network(0, 0.5, {("pgd20", 8.0): 0.4})])
    two = make_run("two", PLAIN, [network(1, 0.5, {("pgd20", 8.0): 0.4}, batch_size=50)])
    assert compare_runs([one]).remarks == []
    (remark,) = compare_runs([one, two]).remarks
    assert remark == "The attack pgd20@8 did not have the same settings and number of images in every run."
    assert f"- {remark}" in compare_runs([one, two]).markdown()


def test_incomplete_runs_are_named(experiment: Path) -> None:
    third = experiment / "slow"
    third.mkdir()
    (third / "config.yaml").write_text("relabel: {mode: stored}\n")
    write_json(third / "teacher" / "manifest.json", {})
    write_json(third / "distilled" / "recipe.json", {})
    (experiment / "notes").mkdir()
    table = compare_runs([experiment])
    assert len(table.rows) == 4
    assert str(table.incomplete[0]) == f"{third} is not finished: it has no complete distilled/, results.json."
    assert table.terminal().endswith(str(table.incomplete[0]))
    write_json(third / "distilled" / "manifest.json", {})
    assert compare_runs([third]).incomplete[0].missing == ["complete labels/", "results.json"]
    for unstored in ("relabel: {mode: online}\n", "evaluate: {labels: hard}\n"):
        (third / "config.yaml").write_text(unstored)
        assert compare_runs([third]).incomplete[0].missing == ["complete student/", "results.json"]
    assert compare_runs([third]).terminal().startswith("No finished run.")


def test_results_of_earlier_outcomes_are_not_shown(experiment: Path) -> None:
    """Evaluate was begun anew, by other options: its results are not told before they are made."""
    run = experiment / "guard"
    recipe = Recipe({"attacks.suite": "strict"})
    results = read_json(run / "results.json")
    write_json(run / "results.json", {**results, "fingerprint": digest(recipe.as_json())})
    Artifact(run / "outcomes", "outcomes", recipe).begin()
    assert compare_runs([experiment]).incomplete == [], "begun again from the same recipe they are the same"
    (run / "outcomes" / "recipe.json").unlink()
    Artifact(run / "outcomes", "outcomes", Recipe({"attacks.suite": "targeted"})).begin()
    table = compare_runs([experiment])
    assert {row.run for row in table.rows} == {"sre2l"}
    (left,) = map(str, table.incomplete)
    assert left == f"{run} is not finished: it has no results.json of its present outcomes/, only one of earlier ones."
    report.write(experiment, [experiment / "sre2l", run])
    assert not (experiment / "report.md").exists()
    assert describe(run).endswith("\n  results   only those of earlier outcomes")
    assert verify(run)[1] == [
        f"{run / 'results.json'} was not made from {run / 'outcomes'}; remove it and run the same command again."
    ]


def test_fewer_images_attacked_than_tested(make_run: RunMaker) -> None:
    student = network(0, 0.5, {("pgd20", 8.0): 0.4})
    student["attacks"][0]["count"] = 100
    assert "images 500 (100 attacked)" in compare_runs([make_run("one", PLAIN, [student])]).caption


def test_runs_are_found_at_any_depth_and_none_within_a_run(experiment: Path, tmp_path: Path) -> None:
    deep = tmp_path / "all/seed0/deep"
    deep.mkdir(parents=True)
    shutil.copytree(experiment, deep / "demo")
    (tmp_path / "all/.hidden").symlink_to(experiment)
    (tmp_path / "all/circle").symlink_to(tmp_path / "all")
    (tmp_path / "all/linked").symlink_to(experiment / "guard")
    shutil.copytree(experiment / "guard", deep / "demo/guard/export")
    found = [deep / "demo/guard", deep / "demo/sre2l"]
    assert run_folders([tmp_path / "all"]) == [tmp_path / "all/linked", *found]
    assert run_folders([deep, experiment]) == [*found, experiment / "guard", experiment / "sre2l"]


def test_wrong_folders_are_one_sentence(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"The run folder .*nowhere does not exist\."):
        compare_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="empty holds no run"):
        compare_runs([tmp_path / "empty"])
    for damaged in ('{"name": "x"', "[]"):
        (experiment / "guard" / "results.json").write_text(damaged)
        with pytest.raises(ArtifactError, match=r"results\.json is damaged"):
            compare_runs([experiment])
    write_json(experiment / "guard" / "results.json", {"name": "x"})
    with pytest.raises(ArtifactError, match="not the results of a run of this version"):
        compare_runs([experiment])


def test_a_thinned_penalty_says_so(make_run: RunMaker) -> None:
    options = CURVATURE | {"every": 4, "fraction": 0.5, "gradients": "functorch"}
    text = compare_runs([make_run("thin", options, students([0.9], [0.8], [0.7]))]).terminal()
    assert "curvature λ=1 every=4 fraction=0.5 gradients=functorch h=1.5 " in text


def test_options_that_are_off_or_nought_are_told_too(make_run: RunMaker) -> None:
    off = CURVATURE | {"weight": 0.0, "h_scaling": False}
    text = compare_runs([make_run("off", off, students([0.9], [0.8], [0.7]))]).terminal()
    assert "curvature λ=0 h=1.5 h_scaling=False " in text
