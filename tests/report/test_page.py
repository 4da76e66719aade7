"""The page as a file: groups, missing parts, escaping, size, equal bytes. How it looks is in tests/browser."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

import distill
from distill.errors import ArtifactError
from distill.files import file_digest, write_json
from distill.report import write_page
from distill.report.charts import Spectra, accuracy_plots, read_all_spectra, spectrum_plots
from distill.report.groups import Group, group_runs
from distill.report.page import inputs_digest, made_of, render
from distill.report.plots import MARKERS, Line, Plot, _drawn
from distill.report.runs import find_runs
from distill.report.sections import curvature
from distill.report.thumbnails import distilled_sheet, film_sheet
from distill.robustness.bound import Spectrum
from distill.run_folder import Artifact, Recipe
from tests.report.conftest import RunMaker, network

CURVATURE = {"name": "curvature", "weight": 1.0, "h": 1.5}


def student(seed: int, clean: float, at8: float, at16: float) -> dict[str, Any]:
    return network(seed, clean, {("pgd20", 8.0): at8, ("pgd20", 16.0): at16})


def repeated(make_run: RunMaker, **more: Any) -> list[Path]:
    """Three repetitions of one run, with accuracies 50, 40 and 60 % at 16/255."""
    return [
        make_run(f"demo_{seed}/guard", CURVATURE, [student(0, 0.9, 0.8, accuracy)], **{"seed": seed, **more})
        for seed, accuracy in enumerate([0.5, 0.4, 0.6])
    ]


def distilled(run: Path, side: int = 8, classes: int = 10, snapshots: int = 0) -> None:
    """A complete distilled set of real digits, enlarged where ``side`` is more than 8."""
    scans = np.repeat(load_digits().images[:40, None] * 255 / 16, 3, 1).round().astype(np.uint8)
    images = scans.repeat(side // 8, 2).repeat(side // 8, 3)
    if side > 8:
        # As hard to compress as recovered images are.
        noise = np.random.default_rng(0).integers(0, 60, images.shape)
        images = np.clip(images + noise, 0, 255).astype(np.uint8)
    tensors = {"images": images, "labels": load_digits().target[:40].astype(np.int64)}
    tensors["snapshots"] = images[None, :5].repeat(snapshots, 0) if snapshots else np.zeros((0,), np.uint8)
    (run / "distilled").mkdir(parents=True, exist_ok=True)
    save_file(tensors, run / "distilled" / "unit.safetensors")
    names = [f"digit_{label}, numeral" for label in range(classes)]
    manifest = {"units": ["unit.safetensors"], "class_names": names, "files": {"unit.safetensors": {"bytes": 1234}}}
    write_json(run / "distilled" / "manifest.json", manifest)


def page_of(*paths: Path) -> str:
    runs, incomplete = find_runs(paths)
    return render(runs, incomplete)


def words(page: str) -> str:
    """What is to be read on a page: its text without elements."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|script).*?</\1>", "", page))))


def test_repetitions_are_one_row_with_the_spread_over_runs(make_run: RunMaker) -> None:
    runs = repeated(make_run)
    other = make_run("demo_0/sre2l", {"name": "none", "weight": None}, [student(0, 0.9, 0.7, 0.1)])
    text = words(page_of(*runs, other))
    assert "guard (3 runs)" in text
    assert "50.0 ± 10.0" in text, "sample standard deviation of 50, 40, 60"
    assert "mean ± sample standard deviation over runs" in text
    assert "Every run by itself" in text
    assert "demo_2/guard" in text
    (plot,) = accuracy_plots(group_runs(find_runs([*runs, other])[0]))
    line = plot.lines[0]
    assert (line.x, line.name, line.kind) == ([0.0, 8.0, 16.0], "guard (3 runs)", "student")
    assert line.y == pytest.approx([90, 80, 50])
    assert line.sd == pytest.approx([0, 0, 10])


def test_only_repetitions_are_grouped(make_run: RunMaker) -> None:
    same_seed = repeated(make_run, seed=0)
    assert len(group_runs(find_runs(same_seed)[0])) == 3, "one seed three times is no spread over seeds"
    runs = repeated(make_run)
    for number, run in enumerate(runs):
        config = {
            "name": f"demo_{number}/guard",
            "seed": number,
            "squeeze": {"epochs": 20},
            "loader": {"workers": number},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert [len(group.runs) for group in group_runs(find_runs(runs)[0])] == [3]
    (runs[1] / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "squeeze": {"epochs": 40}}))
    groups = group_runs(find_runs(runs)[0])
    assert [(group.name, len(group.runs)) for group in groups] == [("demo_0/guard", 2), ("demo_1/guard", 1)]
    text = words(page_of(*runs))
    assert re.search(r"squeeze\.epochs 20 40 20", text) or re.search(r"squeeze\.epochs 20 20 40", text)


def test_runs_of_one_whole_name_are_known_by_their_folders(make_run: RunMaker) -> None:
    """Two run roots with the same experiment: every row, box and line belongs to one of them."""
    roots = [
        make_run("demo/guard", {**CURVATURE, "h": h}, [student(0, 0.9, 0.8, 0.5)], root)
        for root, h in (("first", 1.5), ("second", 3.0))
    ]
    other = make_run("demo/sre2l", {"name": "none"}, [student(0, 0.9, 0.7, 0.1)], "first")
    assert [group.name for group in group_runs(find_runs([*roots, other])[0])] == [
        *("first/demo/guard", "second/demo/guard", "sre2l")
    ]
    page = page_of(*roots, other)
    rows = re.findall(r'<tr data-run="(\d)"><th scope="row">([\w/]+)</th><td class="text">curvature', page)
    assert rows == [("0", "first/demo/guard"), ("1", "second/demo/guard")] * 2, "students, then teachers"


def test_repetitions_of_one_whole_name_are_known_by_their_folders(make_run: RunMaker) -> None:
    runs = [make_run("demo/guard", CURVATURE, [student(0, 0.9, 0.8, 0.5)], f"root{seed}", seed=seed) for seed in (0, 1)]
    text = words(page_of(*runs))
    assert "guard (2 runs)" in text
    for name in ("root0/demo/guard", "root1/demo/guard"):
        assert f" {name} curvature" in text, "by itself"
        assert f" {name}, student, seed 0 pgd20@8" in text, "its attacks"


def test_repetitions_of_two_settings_under_the_same_names_are_told_apart(make_run: RunMaker) -> None:
    """Two run roots, each with two seeds: every run has a name of its own in the tables of single runs."""
    runs = [
        make_run(f"demo_{seed}/guard", {**CURVATURE, "h": h}, [student(0, 0.9, 0.8, 0.5)], root, seed=seed)
        for root, h in (("first", 1.5), ("second", 3.0))
        for seed in (0, 1)
    ]
    groups = group_runs(find_runs(runs)[0])
    names = [group.name_of(run) for group in groups for run in group.runs]
    assert names == [f"{root}/demo_{seed}/guard" for root in ("first", "second") for seed in (0, 1)]


def test_old_results_without_new_keys(make_run: RunMaker) -> None:
    page = page_of(make_run("old", {"name": "none"}, [student(0, 0.9, 0.8, 0.5)], teacher=None, recover=None))
    text = words(page)
    for absent in (
        "passes",
        "flags",
        "Sanity of the attacks",
        "Distilled images,",
        "Curvature and",
        "Costs",
        "Training",
    ):
        assert absent not in text.replace("forward passes", "").replace("backward passes", "").replace(
            "passes are means", ""
        ), absent
    assert "Accuracy over the radius" in text
    assert "Beside the paper" not in text


def test_effort_flags_and_published_figures(make_run: RunMaker) -> None:
    of_guard = student(3, 0.5, 0.3, 0.2)
    for attack in of_guard["attacks"]:
        attack |= {"norm": "Linf", "effort": {"forward": 700.0, "backward": 600.5}}
    flag = "gradient masking suspected: Square leaves 10.0 % standing, PGD-20 20.0 %"
    check = {"name": "square", "epsilon": 16.0, "value": 0.1, "reference": 0.2, "passed": False, "sentence": "Oh."}
    of_guard["sanity"] = {"flags": [flag], "checks": [check, {**check, "passed": True, "reference": None}]}
    stated = {"guard": {"clean": 57.93, "pgd20@16": 12.5, "autoattack": 19.69}}
    run = make_run("x/guard", CURVATURE, [of_guard], published=stated, teacher=None)
    text = words(page_of(run))
    assert "1,400 / 1,201" in text
    assert f"guard, student, seed 3: {flag}" in text
    assert "2 checks, 1 not passed" in text
    assert re.search(r"clean 50\.0 57\.93 -7\.9", text)
    assert re.search(r"autoattack – 19\.69 –", text), "stated by the paper and not measured here"
    assert "20.0 paper 12.5" in text


def test_columns_of_text_are_no_numbers(make_run: RunMaker) -> None:
    """Headings that are sorted by number are those with a number below them, whatever column stands before them."""
    mine = student(0, 0.5, 0.3, 0.2)
    check = {"name": "square", "epsilon": 16.0, "value": 0.1, "reference": None, "passed": True, "sentence": "Well."}
    mine["sanity"] = {"flags": [], "checks": [check, {**check, "epsilon": None}]}
    run = make_run("one", CURVATURE, [mine], teacher=None)
    write_json(run / "provenance.json", {"teacher": [{"seconds": 3, "hardware": "oak"}]})
    headings = dict.fromkeys(
        re.findall(r"<th scope=\"col\" aria-sort=\"none\"(.*?)><button type=\"button\">(.*?)<", page_of(run))
    )
    numbers = {heading for kind, heading in headings if kind == ' class="number"'}
    texts = {heading for kind, heading in headings if not kind}
    assert {"clean", "pgd20@8", "accuracy, %", "images", "ε", "value, %", "squeeze", "all"} <= numbers
    assert {"run", "network", "regularizer", "attack", "check", "specification", "meaning", "hardware"} <= texts
    assert not numbers & texts


def test_the_best_is_told_in_words_too(make_run: RunMaker) -> None:
    runs = [make_run(f"x/{n}", {"name": "none"}, [student(0, c, 0.3, 0.2)]) for n, c in (("a", 0.9), ("b", 0.8))]
    page = page_of(*runs)
    assert '<strong>90.0</strong><span class="unseen"> best</span></td>' in page
    assert "<strong>80.0</strong>" not in page


def test_the_other_norm_has_its_own_curve(make_run: RunMaker) -> None:
    both = network(0, 0.9, {("pgd", 4.0): 0.5, ("pgd", 8.0): 0.4, ("cw", None): 0.3})
    for epsilon, accuracy in ((0.25, 0.7), (0.5, 0.6)):
        both["attacks"].append({**both["attacks"][0], "norm": "L2", "epsilon": epsilon, "accuracy": accuracy})
    first, second = accuracy_plots(group_runs(find_runs([make_run("one", CURVATURE, [both], teacher=None)])[0]))
    assert (first.lines[0].x, second.lines[0].x) == ([0, 4, 8], [0, 0.25, 0.5])
    assert second.lines[0].y == pytest.approx([90, 70, 60])
    assert first.key != second.key
    single = make_run("two", CURVATURE, [network(0, 0.9, {("pgd", 4.0): 0.5})], teacher=None)
    assert accuracy_plots(group_runs(find_runs([single])[0])) == [], "one radius is no curve"


def test_a_curve_is_of_the_attacked_images_from_its_beginning(make_run: RunMaker) -> None:
    """At radius 0 too, where more images were tested than attacked."""
    few = [student(seed, clean, 0.7, 0.1) for seed, clean in ((0, 0.8), (1, 0.9))]
    for each in few:
        each["clean"] |= {"top1": 0.6, "count": 5000}
    (plot,) = accuracy_plots(group_runs(find_runs([make_run("one", CURVATURE, few, teacher=None)])[0]))
    assert plot.lines[0].y == pytest.approx([85, 70, 10])
    assert plot.lines[0].sd == pytest.approx([50**0.5, 0, 0])


def test_a_deviation_below_nought_leaves_a_logarithmic_axis_alone() -> None:
    """Its ends follow the lines, and the shading ends at the lower one."""
    line = Line([0, 1, 2], [0.1, 1.0, 10.0], 0, "guard", sd=[0.2, 0.5, 5.0])
    figure = _drawn(Plot("k", "t", "x", "y", "a", [line]), "black", "grey", ["red"], legend=False)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low == pytest.approx(0.1 / 150**0.05)
    assert high == pytest.approx(15 * 150**0.05)
    corners = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx((low, 15))


def test_runs_are_told_apart_by_more_than_their_colour(make_run: RunMaker) -> None:
    """Of eight runs each has a marker of its own, on long lines too; the next with the same colours have others."""
    lines = [
        Line(range(length), range(1, length + 1), group, f"r{group}") for length in (3, 160) for group in range(24)
    ]
    figure = _drawn(Plot("k", "t", "x", "y", "a", lines), "black", "grey", ["red"] * 24, legend=False)
    (axes,) = figure.axes
    shapes = [line.get_marker() for line in axes.lines]
    assert shapes[:24] == shapes[24:], "a run has the same in every drawing"
    assert len(set(shapes[:8])) == 8
    assert len({(group % 8, shapes[group]) for group in range(24)}) == 24
    page = page_of(*[make_run(f"arm{n}", {"name": f"r{n}"}, [student(0, 0.9, 0.8, 0.5)]) for n in range(9)])
    boxes = re.findall(
        r'<input type="checkbox" value="(\d)" checked>.*?<path transform="[^"]*" d="(.*?)"', page, re.DOTALL
    )
    assert [d for _, d in boxes] == [MARKERS[shape] for shape in shapes[:9]]
    legend = re.findall(r'<li data-run="(\d)">.*?<path transform="[^"]*" d="(.*?)"', page, re.DOTALL)
    assert set(legend) == set(boxes)


class Elements(HTMLParser):
    """Names of elements and their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_text_from_outside_stays_text(make_run: RunMaker) -> None:
    evil = "<img src=x onerror=alert(1)>\"'</script>$x^2$"
    mine = student(0, 0.9, 0.8, 0.5)
    mine["sanity"] = {"flags": [evil], "checks": []}
    for attack in mine["attacks"]:
        attack["name"] = evil
    run = make_run("evil", {"name": evil}, [mine], dataset=evil)
    results = json.loads((run / "results.json").read_text())
    write_json(run / "results.json", {**results, "name": f"demo/{evil}"})
    distilled(run)
    manifest = json.loads((run / "distilled/manifest.json").read_text())
    write_json(run / "distilled/manifest.json", {**manifest, "class_names": [evil] * 10})
    (run / "config.yaml").write_text(f"note: '{evil.replace(chr(39), '')}'\n")
    write_json(run / "provenance.json", {evil: [{"seconds": 3, "hardware": evil, "command": evil}]})
    page = page_of(run)
    elements = Elements(page).found
    assert all("onerror" not in attributes for _, attributes in elements)
    assert [name for name, _ in elements].count("script") == 1
    sources = [attributes.get("src") or "" for name, attributes in elements if name == "img"]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert evil.split(",")[0] in words(page)


def test_nothing_is_asked_of_a_network(make_run: RunMaker) -> None:
    run = make_run("one", CURVATURE, [student(0, 0.9, 0.8, 0.5)])
    distilled(run, snapshots=2)
    (run / "config.yaml").write_text("recover: {snapshots: [0], iterations: 10}\n")
    page = page_of(run)
    assert "Recovery of the first images" in page
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"@import|<link(?! rel=\"icon\" href=\"data:,\")", page)


def test_equal_files_make_equal_bytes_and_are_not_written_twice(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run("one", CURVATURE, [student(0, 0.9, 0.8, 0.5), student(1, 0.8, 0.7, 0.4)])
    distilled(run)
    path = tmp_path / "out" / "report.html"
    assert write_page(path, [run])
    first, written = path.read_bytes(), path.stat().st_mtime_ns
    assert write_page(path, [run])
    assert path.stat().st_mtime_ns == written
    code = "import sys, pathlib; from distill.report import write_page\n"
    code += "write_page(pathlib.Path(sys.argv[1]), sys.argv[2:]); print('torch' in sys.modules)"
    again = tmp_path / "again.html"
    done = subprocess.run([sys.executable, "-c", code, again, run], capture_output=True, text=True, check=True)
    assert again.read_bytes() == first, "another process, another seed of hashes"
    assert done.stdout == "False\n", "a page needs no torch"
    (run / "metrics.jsonl").write_text('{"stage": "teacher", "series": "", "step": 5, "loss": 2.5}\n')
    write_page(path, [run])
    assert "Squeeze: loss of the teacher" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert made_of(path) != made_of(again)


@pytest.mark.parametrize("program", ["report/charts.py", "robustness/metrics.py", "robustness/bound.py", "config.py"])
def test_a_page_of_other_programs_is_made_again(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    runs, _ = find_runs([make_run("one", CURVATURE, [student(0, 0.9, 0.8, 0.5)])])
    before = inputs_digest(runs)
    assert inputs_digest(runs) == before
    changed = Path(distill.__file__).parent / program
    monkeypatch.setattr("distill.report.page.file_digest", lambda path: path == changed or file_digest(path))
    assert inputs_digest(runs) != before


def test_many_runs_stay_small(make_run: RunMaker) -> None:
    runs = []
    for number in range(30):
        run = make_run(f"big/arm{number:02d}", {"name": f"r{number}"}, [student(0, 0.9, 0.8, number / 100)])
        losses = [{"stage": "student", "series": "seed0", "step": s, "loss": 1 / (s + 1)} for s in range(1000)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, losses)) + '\n{"stage": "stu')
        write_json(run / "provenance.json", {"teacher": [{"seconds": 36, "command": 16000 * "long words "}]})
        runs.append(run)
    page = page_of(*runs)
    assert len(page) < 10_000_000
    text = words(page)
    assert "The first 24 of 30 runs are drawn." in text
    assert "So that the page stays small; config.yaml and provenance.json are in the run's folder." in text
    assert page.count("long words") < 30 * 16000


def test_pictures_stay_within_their_budget(make_run: RunMaker) -> None:
    runs = [make_run(f"big/arm{n}", {"name": f"r{n}"}, [student(0, 0.9, 0.8, 0.5)]) for n in range(5)]
    for run in runs:
        distilled(run, side=224, snapshots=2)
        (run / "config.yaml").write_text("recover: {snapshots: [0], iterations: 10}\n")
    groups = group_runs(find_runs(runs)[0])
    whole, film = distilled_sheet(groups), film_sheet(groups)
    assert whole
    assert film
    assert [strip.name for strip in whole.strips] == [f"arm{n // 2}" for n in range(10)]
    assert [strip.name for strip in film.strips] == [f"arm{n // 3}" for n in range(15)]
    assert (whole.note, film.note) == ("", "")
    picture = whole.strips[0].pictures[3]
    assert picture
    assert (picture.width, picture.alt) == (112, "arm0: distilled image 1 of digit 3")
    size = sum(len(p.source) for strip in whole.strips for p in strip.pictures if p)
    fewer = distilled_sheet(groups, budget=round(0.6 * size))
    assert fewer
    assert [strip.name for strip in fewer.strips] == [f"arm{n}" for n in range(5)]
    assert fewer.note == "1 rows per run instead of 2, so that the page stays small"
    least = distilled_sheet(groups, budget=round(0.25 * size))
    assert least
    assert [strip.name for strip in least.strips] == ["arm0", "arm1"]
    assert least.note == "the first 2 of 5 runs, so that the page stays small"


def test_unfinished_runs(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run("demo/one", CURVATURE, [student(0, 0.9, 0.8, 0.5)])
    (run.parent / "two").mkdir()
    (run.parent / "two" / "config.yaml").write_text("{}\n")
    assert "two is not finished" in words(page_of(run.parent))
    path = tmp_path / "none.html"
    assert not write_page(path, [run.parent / "two"])
    assert not path.exists()


def spectra(run: Path, level: float, networks: tuple[str, ...] = ("teacher", "seed0"), **inputs: str) -> None:
    """Complete spectra of four images: λ₁ from ``level`` to four times as much, measured loss 1 + ``level``."""
    artifact = Artifact(run / "spectrum", "spectrum", Recipe({}, inputs))
    artifact.begin()
    for place, name in enumerate(networks):
        first, one = (level + place) * np.arange(1.0, 5.0), np.ones(4)
        measured = Spectrum(first[:, None], one, one, one, np.arange(4), np.array([0.5]), one[:, None] + level + place)
        measured.write(run / "spectrum" / f"{name}.safetensors")
    artifact.finish(networks=list(networks))


def test_spectra_of_networks_that_were_made_anew_are_not_shown(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run("one", CURVATURE, [student(0, 0.9, 0.8, 0.5)])
    for name in ("teacher", "student"):
        write_json(run / name / "manifest.json", {"fingerprint": f"first {name}"})
    spectra(run, 2.0, teacher="first teacher", student="first student", dataset="elsewhere")
    page, path = page_of(run), tmp_path / "report.html"
    assert "one, seed0 4 " in words(page)
    assert "earlier networks" not in page
    assert write_page(path, [run])
    write_json(run / "student" / "manifest.json", {"fingerprint": "second student"})
    assert write_page(path, [run])
    text = words(path.read_text())
    assert "one, teacher 4 " in text
    assert "one, seed0 4 " not in text
    assert f"The spectra of student in {run / 'spectrum'} are of earlier networks and not shown; remove " in text
    (run / "teacher" / "manifest.json").unlink()
    text = words(page_of(run))
    assert "The spectra of student and teacher in" in text
    assert "one, teacher 4 " not in text
    assert not any(plot.key == "eigenvalues" for plot in spectrum_plots(*grouped(run)))


def test_the_curvature_table_names_every_run(make_run: RunMaker) -> None:
    """Of three repetitions the first has no spectra; the rows of the others are called as elsewhere."""
    runs = repeated(make_run)
    for run, level in zip(runs[1:], (2.0, 4.0), strict=True):
        spectra(run, level)
    table = curvature(*grouped(*runs))
    assert table
    assert table.headings[:4] == ["network", "images", "mean λ₁", "median λ₁"]
    names = [f"demo_{seed}/guard, {network}" for seed in (1, 2) for network in ("teacher", "seed0")]
    assert [line.head for line in table.lines] == names
    assert [line.group for line in table.lines] == [0] * 4
    # λ₁ is level · (1, 2, 3, 4), of the student (level + 1) · (1, 2, 3, 4); ρ = ½, and all other figures are 1.
    assert [line.fields[1].text for line in table.lines] == ["5", "7.5", "10", "12.5"]
    assert [field.text for field in table.lines[0].fields] == ["4", "5", "5", "1", "1", "0.5", "0.625", "3", "0.5"]
    alone = curvature(*grouped(runs[1]))
    assert alone
    assert [line.head for line in alone.lines] == ["guard, teacher", "guard, seed0"]


def test_the_spread_of_curvature_is_over_runs(make_run: RunMaker) -> None:
    """Runs are counted, not their students: one run with three of them weighs as much as one with a single one."""
    runs = repeated(make_run)
    spectra(runs[0], 2.0, ("seed0", "seed1", "seed2"))
    spectra(runs[1], 5.0, ("seed0",))
    profile, bound = spectrum_plots(*grouped(*runs))
    (line,) = profile.lines
    assert line.y == pytest.approx([16, 12, 8, 4]), "λ₁ = 4, 3, 2, 1 times 3 and 5"
    assert line.sd == pytest.approx([2**0.5 * each for each in (4, 3, 2, 1)])
    (measured,) = [line for line in bound.lines if line.kind == "measured"]
    assert measured.y == pytest.approx([1 + 4])
    assert measured.sd == pytest.approx([2**0.5])
    profile, bound = spectrum_plots(*grouped(runs[0]))
    assert profile.lines[0].y == pytest.approx([12, 9, 6, 3])
    assert profile.lines[0].sd == pytest.approx([4, 3, 2, 1]), "of a single run over its students"
    assert [line.sd for line in bound.lines if line.kind == "measured"] == [pytest.approx([1])]


def grouped(*runs: Path) -> tuple[list[Group], Spectra]:
    groups = group_runs(find_runs(runs)[0])
    return groups, read_all_spectra(groups)


def test_a_damaged_file_is_one_sentence(make_run: RunMaker) -> None:
    run = make_run("one", CURVATURE, [student(0, 0.9, 0.8, 0.5)])
    distilled(run)
    (run / "distilled" / "unit.safetensors").write_bytes(b"\x08")
    with pytest.raises(ArtifactError, match=r"unit\.safetensors cannot be read .*guard verify"):
        page_of(run)
    (run / "config.yaml").write_text("a: [1\n")
    with pytest.raises(ArtifactError, match=r"config\.yaml is damaged"):
        page_of(run)
