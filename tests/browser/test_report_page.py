"""``report.html`` as a person sees it, made by real runs of two arms on digits."""

from __future__ import annotations

import functools
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.browser.report_page import faults, opened, picture, set_scheme
from tests.browser.tensorboard_page import missing_programs
from tests.running import SMALL, command, guard

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs() or "-"),
]

SMALLEST = [
    *("squeeze.epochs=2", "squeeze.warmup_epochs=0", "teacher.width=4", "student.width=4", "recover.iterations=10"),
    *("recover.images_per_class=2", "recover.snapshots=[0,5]", "relabel.epochs=5", "evaluate.batch_size=20"),
    *("attacks.max_images=10", "attacks.sanity_images=1"),
]
VISIBLE = """
return [...document.querySelectorAll(arguments[0])].filter(each => each.getBoundingClientRect().width > 0).length;
"""
COLUMN = """
const table = document.querySelector(arguments[0] + ' table');
const heads = [...table.tHead.rows[0].cells];
const place = heads.findIndex(head => head.textContent.trim() === arguments[1]);
return {sort: heads[place].getAttribute('aria-sort'),
        rows: [...table.tBodies[0].rows].map(row => [row.cells[0].textContent, row.cells[place].textContent.trim()])};
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms with snapshots, checks and spectra; the page as ``guard report`` writes it."""
    folder = tmp_path_factory.mktemp("report")
    small = [text for text in SMALL if not text.startswith("dataset=")]
    done = guard([*command(folder, "experiment=demo", *small, *SMALLEST, name="small")])
    assert done.returncode == 0, done.stderr
    runs = folder / "runs" / "small"
    assert f"Page: {runs / 'report.html'}" in done.stdout
    written = (runs / "report.html").read_bytes()
    start = command(folder)[:3]
    done = guard([*start, "spectrum", str(runs), "--images", "3", "--radii", "0.2,1"])
    assert done.returncode == 0, done.stderr
    done = guard([*start, "report", str(runs), "--format", "csv"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run,regularizer,network,")
    assert done.stderr.splitlines()[-1] == f"Page: {runs / 'report.html'}"
    assert (runs / "report.html").read_bytes() != written, "the spectra have come to it"
    return runs


@pytest.fixture(scope="module")
def wide(experiment: Path) -> Iterator[Chrome]:
    with opened(experiment / "report.html", 1400, 1000) as browser:
        yield browser


def test_a_wide_window(wide: Chrome, tmp_path: Path) -> None:
    assert faults(wide) == {}
    headings = wide.execute_script("return [...document.querySelectorAll('h1, h2')].map(each => each.textContent)")
    assert headings[0] == "small"
    assert {"Results", "Accuracy over the radius", "Distilled images", "Curvature and the bound"} < set(headings)
    assert {"Sanity of the attacks", "Training", "Attacks", "Costs", "Configuration and provenance"} < set(headings)
    alts = wide.execute_script("return [...document.images].map(image => image.alt)")
    assert "guard: distilled image 1 of 3" in alts
    assert "sre2l: image 1 after 5 iterations" in alts
    drawings = wide.execute_script(
        "return [...document.querySelectorAll('svg[role=img]')].map(each => each.getAttribute('aria-label'))"
    )
    assert any(text.startswith("Accuracy in per cent under pgd20") and "guard, teacher:" in text for text in drawings)
    assert any("largest eigenvalue" in text for text in drawings)
    assert wide.execute_script("return document.documentElement.lang") == "en"
    bad = "return document.querySelectorAll('th:not([scope]), table:not(:has(caption)), button:not([type])').length"
    assert wide.execute_script(bad) == 0
    size = wide.execute_script("return document.documentElement.outerHTML.length")
    assert size < 3_000_000
    picture(wide, tmp_path / "wide.png")
    with Image.open(tmp_path / "wide.png") as shot:
        assert shot.size == (1400, 1000)


def test_a_click_on_a_heading_sorts(wide: Chrome) -> None:
    before = wide.execute_script(COLUMN, "#results", "clean")
    assert before["sort"] == "none"
    button = next(
        each for each in wide.find_elements("css selector", "#results th button") if each.text.startswith("clean")
    )
    button.click()
    falling = wide.execute_script(COLUMN, "#results", "clean")
    assert falling["sort"] == "descending"
    values = [float(text.split()[0]) for _, text in falling["rows"]]
    assert values == sorted(values, reverse=True)
    assert sorted(falling["rows"]) == sorted(before["rows"])
    button.click()
    rising = wide.execute_script(COLUMN, "#results", "clean")
    assert rising["sort"] == "ascending"
    assert [float(text.split()[0]) for _, text in rising["rows"]] == sorted(values)
    # The keyboard does the same; texts follow their alphabet, and the mark moves on.
    name = wide.find_element("css selector", "#results th button")
    name.send_keys(" ")
    by_name = wide.execute_script(COLUMN, "#results", "run")
    assert by_name["sort"] == "ascending"
    assert [head for head, _ in by_name["rows"]] == ["guard", "guard", "sre2l", "sre2l"]
    assert wide.execute_script(COLUMN, "#results", "clean")["sort"] == "none"


def test_a_click_on_a_heading_of_text_sorts(wide: Chrome) -> None:
    """Columns of text after columns of numbers too."""
    wide.execute_script("document.querySelectorAll('#attacks details').forEach(each => each.open = true)")
    heading = "//section[@id='attacks']//th/button[text()='specification']"
    ordered = "return [...arguments[0]].sort((one, two) => one.localeCompare(two))"
    for sort in ("ascending", "descending"):
        wide.find_element("xpath", heading).click()
        column = wide.execute_script(COLUMN, "#attacks", "specification")
        texts = [text for _, text in column["rows"]]
        expected = wide.execute_script(ordered, texts)
        assert len(set(texts)) > 1
        assert (column["sort"], texts) == (sort, expected if sort == "ascending" else expected[::-1])


def test_a_click_on_a_run_hides_its_rows_lines_and_pictures(wide: Chrome) -> None:
    parts = ["tr", "img", "svg g", "li"]
    before = {part: wide.execute_script(VISIBLE, f"{part}[data-run='0'], [data-run='0'] {part}") for part in parts}
    others = {part: wide.execute_script(VISIBLE, f"{part}[data-run='1'], [data-run='1'] {part}") for part in parts}
    assert all(before.values())
    boxes = wide.find_elements("css selector", ".runs input")
    assert [box.find_element("xpath", "..").text.strip() for box in boxes] == ["guard", "sre2l"]
    boxes[0].click()
    hidden = {part: wide.execute_script(VISIBLE, f"{part}[data-run='0'], [data-run='0'] {part}") for part in parts}
    assert set(hidden.values()) == {0}
    now = {part: wide.execute_script(VISIBLE, f"{part}[data-run='1'], [data-run='1'] {part}") for part in parts}
    assert now == others
    boxes[0].click()
    assert wide.execute_script(VISIBLE, "img[data-run='0'], [data-run='0'] img") == before["img"]


def test_the_keyboard_finds_its_way(wide: Chrome) -> None:
    wide.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    wide.find_element("css selector", "a.skip").send_keys("")
    box = "const box = document.activeElement.getBoundingClientRect(); return [box.left >= 0, box.width > 20]"
    assert wide.execute_script(box) == [True, True], "the skip link is seen when it has the focus"
    wide.find_element("css selector", "a.skip").send_keys("\ue007")
    assert wide.execute_script("return document.activeElement.id") == "results"
    unreachable = "return [...document.querySelectorAll('.scroll, pre')].filter(each => each.tabIndex < 0).length"
    assert wide.execute_script(unreachable) == 0


def test_light_and_dark(wide: Chrome, tmp_path: Path) -> None:
    """Ground and letters change places, in the drawings too, and both have contrast."""
    levels, inks = {}, {}
    for scheme in ("light", "dark"):
        set_scheme(wide, scheme)
        wide.execute_script("document.querySelector('#accuracy').scrollIntoView()")
        shot = Image.open(io.BytesIO(wide.get_screenshot_as_png())).convert("L")
        shot.save(tmp_path / f"{scheme}.png")
        levels[scheme] = float(np.median(np.asarray(shot)))
        ink = "return getComputedStyle(document.querySelector('#accuracy figure svg text')).fill"
        inks[scheme] = wide.execute_script(ink)
    set_scheme(wide, "light")
    assert levels["light"] > 240
    assert levels["dark"] < 40
    assert inks == {"light": "rgb(26, 29, 33)", "dark": "rgb(232, 234, 237)"}


def test_a_narrow_window(experiment: Path, tmp_path: Path) -> None:
    with opened(experiment / "report.html", 390, 844, "dark") as browser:
        assert browser.execute_script("return window.innerWidth") == 390
        browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert faults(browser) == {}
        scrolls = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.execute_script(scrolls) > 0, "wide tables scroll inside their own box"
        height = "return document.querySelector('#accuracy figure svg text').getBoundingClientRect().height"
        assert browser.execute_script(height) >= 9, "letters of a drawing in pixels"
        picture(browser, tmp_path / "narrow.png")
    assert (tmp_path / "narrow.png").stat().st_size > 10_000


def test_what_is_wrong_with_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<p id="a">x</p><p id="a" style="width: 3000px">y</p><img src="data:image/png;base64,AAAA" alt="broken">'
        '<img src="http://127.0.0.1:9/gone.png"><script>console.error("oh")</script>'
    )
    with opened(page) as browser:
        found = faults(browser)
    assert set(found) == {"overflow", "requests", "broken", "unnamed", "twice", "errors"}
    assert found["requests"] == ["http://127.0.0.1:9/gone.png"]
    assert any("oh" in message for message in found["errors"])


def test_over_http_nothing_else_is_fetched(experiment: Path) -> None:
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=experiment)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with opened(experiment / "report.html") as browser:
                browser.get(f"http://127.0.0.1:{server.server_address[1]}/report.html")
                browser.find_element("css selector", ".runs input").click()
                assert faults(browser) == {}
        finally:
            server.shutdown()
            thread.join()
    assert asked == ["/report.html"]
