"""A real TensorBoard server, and a headless Chromium that looks at its page.

``check_run`` looks whether the page shows every stage of a finished run. ``python -m tests.browser.tensorboard_page
LOGDIR OUT.png`` makes a picture of the Images tab. Nothing but the loopback interface is used, and every process that
is started here is ended by its id.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.run_folder import STAGES, TENSORBOARD, numbered
from distill.training.worker_events import ALL, SHOWN_AS

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

DRAWN = """
const found = [];
const look = root => root.querySelectorAll('*').forEach(element => {
    if (element.shadowRoot) look(element.shadowRoot);
    if (element.tagName === 'IMG' && element.complete && element.naturalWidth > 0 && element.offsetWidth > 0)
        found.push([element.src, element.naturalWidth, element.naturalHeight]);
});
look(document);
return found;
"""
"""Every picture that the page shows and has loaded, inside shadow roots too: (address, width, height)."""

TEXT = """
const words = [];
const look = node => {
    if (node.nodeType === Node.TEXT_NODE) words.push(node.textContent.trim());
    else if (!['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName))
        [node.shadowRoot, node].forEach(parent => parent && parent.childNodes.forEach(look));
};
look(document.body);
return words.filter(Boolean).join(' ');
"""
"""All words of the page, inside shadow roots too."""


FETCH = "const done = arguments[1]; fetch(arguments[0]).then(answer => answer.json()).then(done)"
"""What the page itself asks the server for."""
PAGE = 12
"""The Images tab shows at most so many at a time."""


def missing_programs() -> str:
    """Which of Chromium and its driver are not installed, for the reason of a skip; empty when both are."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver" if missing else ""


@contextlib.contextmanager
def tensorboard(logdir: Path, seconds: float = 120) -> Iterator[str]:
    """Serve the event files under a folder on a free port of 127.0.0.1; gives the page's address."""
    # The page shows the folder as it is given here: by its name, without the way to it.
    where = logdir.resolve()
    command = ["-m", "tensorboard.main", "--logdir", where.name, "--host", "127.0.0.1", "--port", "0"]
    with _served(command, where.parent, where, seconds) as address:
        yield address


@contextlib.contextmanager
def guard_tensorboard(run: Path, seconds: float = 120) -> Iterator[str]:
    """The same by ``guard tensorboard``."""
    command = ["-m", "distill", "tensorboard", str(run.resolve()), "--port", "0"]
    with _served(command, Path.cwd(), run / TENSORBOARD, seconds) as address:
        yield address


@contextlib.contextmanager
def _served(command: Sequence[str], folder: Path, logdir: Path, seconds: float) -> Iterator[str]:
    """Gives the address when all events have been read: the page asks for them once, when it is opened."""
    with (
        tempfile.TemporaryFile("w+") as log,
        _ended(subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, cwd=folder)) as server,
    ):
        deadline = time.monotonic() + seconds
        while True:
            log.seek(0)
            said = log.read()
            if address := re.search(r"http://127\.0\.0\.1:\d+/", said):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"TensorBoard did not start: {said}")
            time.sleep(0.2)
        there = {str(path.parent.relative_to(logdir)) for path in logdir.rglob("*tfevents*")}
        while missing := there - set(_asked(f"{address.group()}data/runs")):
            if time.monotonic() > deadline:
                raise RuntimeError(f"TensorBoard has not read {sorted(missing)}")
            time.sleep(0.2)
        yield address.group()


def _asked(address: str) -> Any:
    with urllib.request.urlopen(address) as answer:
        return json.load(answer)


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 1000) -> Iterator[Chrome]:
    """A headless Chromium with a new empty profile that reaches nothing but 127.0.0.1."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    if missing := missing_programs():
        raise RuntimeError(missing)
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for argument in (
            *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
            *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "no-proxy-server"),
            "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *(f"user-data-dir={profile}", f"window-size={width},{height}"),
        ):
            options.add_argument(f"--{argument}")
        service = Service(shutil.which("chromedriver"))
        browser = None
        children: list[int] = []
        try:
            browser = Chrome(options=options, service=service)
            children = _descendants(service.process.pid)
            yield browser
        finally:
            if service.process is not None:
                children = [*children, *_descendants(service.process.pid)]
            with contextlib.suppress(Exception):
                if browser is not None:
                    browser.quit()
            service.stop()
            _end(children)


def wait_for(
    browser: Chrome, words: Sequence[str], pictures: int = 0, seconds: float = 120
) -> list[tuple[str, int, int]]:
    """Wait until the page shows all words and so many loaded pictures; gives the pictures: (address, width, height).

    Raises:
        TimeoutError: naming what is missing.
    """
    deadline = time.monotonic() + seconds
    while True:
        text, drawn = browser.execute_script(TEXT), browser.execute_script(DRAWN)
        lacking = [word for word in words if word not in text]
        if not lacking and len(drawn) >= pictures:
            return [tuple(picture) for picture in drawn]
        if time.monotonic() > deadline:
            raise TimeoutError(f"The page lacks {lacking} and shows {len(drawn)} pictures of {pictures}: {text[:2000]}")
        time.sleep(0.5)


def check_run(run: Path, seconds: float = 120) -> None:
    """Open ``guard tensorboard`` on a finished run, and assert that its page has scalars and images of every stage.

    Every seed has curves of its own; of a stage that workers share the units of all together, and of each, are there.

    Args:
        run: the run folder, with ``results.json``.
        seconds: that the page may take for each view.
    """
    stages = [stage for stage in STAGES if (run / stage / "manifest.json").is_file()]
    seeds = [student["seed"] for student in json.loads((run / "results.json").read_text())["students"]]
    records = [json.loads(path.read_text()) for path in (run / "workers").glob("*.json")]
    made: dict[str, dict[str, int]] = {}
    for record in records:
        published = sum(unit["result"] == "published" for unit in record["units"])
        if published:
            made.setdefault(record["artifact"], {})[record["worker"]] = published
    with guard_tensorboard(run, seconds) as address, chromium() as browser:
        browser.set_script_timeout(seconds)
        browser.get(f"{address}#scalars")
        wait_for(browser, [*map(numbered, stages), SHOWN_AS], seconds=seconds)
        scalars, images = (fetched(browser, f"data/plugin/{kind}/tags") for kind in ("scalars", "images"))
        for stage in map(numbered, stages):
            for kind, found in (("scalars", scalars), ("images", images)):
                tags = [tag for run_name, tags in found.items() if run_name.startswith(stage) for tag in tags]
                assert any(tag.startswith(f"{stage}/") for tag in tags), f"no {kind} of {stage}"
        for seed in seeds:
            assert "4_student/loss" in scalars[f"4_student/seed{seed}"]
        for stage, workers in made.items():
            tag = f"{SHOWN_AS}/{numbered(stage)}"
            for worker, count in {**workers, ALL: sum(workers.values())}.items():
                points = fetched(browser, f"data/plugin/scalars/scalars?run={tag}/{worker}&tag={tag}")
                assert (points[0][2], points[-1][2]) == (0, count), (stage, worker)
                assert [point[1] for point in points] == sorted({point[1] for point in points})
        browser.get("about:blank")
        browser.get(f"{address}#images&tagFilter=.")
        shown = sum(len(tags) for tags in images.values())
        wait_for(browser, ["1_teacher/images"], pictures=min(shown, PAGE), seconds=seconds)


def fetched(browser: Chrome, address: str) -> Any:
    """What the server answers to the page."""
    return browser.execute_async_script(FETCH, address)


def screenshot(
    logdir: Path,
    path: Path,
    tab: str = "images",
    words: Sequence[str] = (),
    pictures: int = 1,
    width: int = 1400,
    height: int = 1000,
    tags: str = "",
    settle: float = 0.0,
) -> None:
    """Save a picture of a tab of TensorBoard's page.

    Args:
        logdir: folder of event files, searched recursively.
        path: PNG file.
        tab: ``images``, ``timeseries``, ``scalars`` or ``text``.
        words: texts, such as tags, that must be on the page.
        pictures: number of pictures that must be loaded.
        width, height: of the window in pixels.
        tags: a regular expression; others are left out.
        settle: seconds to wait for curves, which are drawn after their axes.
    """
    with tensorboard(logdir) as address, chromium(width, height) as browser:
        browser.get(f"{address}?tagFilter={tags}#{tab}" if tags else f"{address}#{tab}")
        wait_for(browser, words, pictures)
        time.sleep(settle)
        browser.save_screenshot(str(path))


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        children = _descendants(process.pid)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _end(children)


def _descendants(pid: int) -> list[int]:
    """Process ids of children, their children and so on."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [*children, *(grandchild for child in children for grandchild in _descendants(child))]


def _end(pids: Sequence[int]) -> None:
    """End what is left of our own processes, after a moment in which they may do so themselves."""
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Save a picture of a tab of TensorBoard's page.")
    parser.add_argument("logdir", type=Path)
    parser.add_argument("path", type=Path)
    parser.add_argument("--tab", default="images")
    parser.add_argument("--words", nargs="*", default=[], help="texts that must be on the page")
    parser.add_argument("--pictures", type=int, default=1, help="pictures that must be loaded")
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--tags", default="", help="regular expression of the tags that are shown")
    parser.add_argument("--settle", type=float, default=0.0, help="seconds to wait for curves")
    screenshot(**vars(parser.parse_args()))
