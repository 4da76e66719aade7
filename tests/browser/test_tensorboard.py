"""TensorBoard's page, as a person sees it, over events that the usual writer made of real digits."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.browser.tensorboard_page import (
    check_run,
    chromium,
    missing_programs,
    screenshot,
    tensorboard,
    wait_for,
)
from tests.running import command, guard, start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs() or "-"),
]


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """uint8 (10, 3, 32, 32)."""
    scans = torch.tensor(load_digits().data[:10] * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return scans.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def logdir(digits: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Event files with a scalar that falls, and two images at two steps."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("runs") / "tensorboard"
    with SummaryWriter(str(folder)) as writer:
        for step in (0, 100):
            writer.add_scalar("squeeze/loss", 1 / (step + 1), step)
            writer.add_image("recover/unit0", torch.cat(list(digits[:5]), 2), step)
            writer.add_image("distilled/grid", torch.cat(list(digits), 2), step)
    return folder


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Whatever happens, the server, the driver and every process of the browser have ended."""
    yield
    commands = []
    for task in Path("/proc/self/task").iterdir():
        # A thread or a process may end meanwhile.
        children: list[str] = []
        with contextlib.suppress(OSError):
            children = (task / "children").read_text().split()
        for child in children:
            with contextlib.suppress(OSError):
                commands.append(Path(f"/proc/{child}/cmdline").read_bytes())
    assert not [command for command in commands if b"tensorboard" in command or b"chrom" in command]


def test_images_and_scalars_are_on_the_page(logdir: Path, digits: torch.Tensor) -> None:
    with tensorboard(logdir) as address, chromium() as browser:
        assert address.startswith("http://127.0.0.1:")
        browser.get(f"{address}#images")
        pictures = wait_for(browser, ["recover/unit0", "distilled/grid", "step", "100"], pictures=2)
        sizes = {(width, height): source for source, width, height in pictures}
        assert set(sizes) == {(160, 32), (320, 32)}
        with urllib.request.urlopen(sizes[320, 32]) as answer:
            shown = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
        assert np.array_equal(shown, torch.cat(list(digits), 2).permute(1, 2, 0).numpy())
        browser.get(f"{address}#scalars")
        wait_for(browser, ["squeeze/loss"])


def test_a_picture_of_the_page(logdir: Path, tmp_path: Path) -> None:
    screenshot(logdir, tmp_path / "page.png", words=["distilled/grid"], pictures=2, width=1200, height=700)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 1200
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == 0).all(1).mean() > 0.01, "the black ground of the digits"


def test_processes_end_although_the_visit_fails(logdir: Path) -> None:
    started: list[int] = []

    def visit() -> None:
        with tensorboard(logdir) as address, chromium() as browser:
            started.append(browser.service.process.pid)
            browser.get(f"{address}#images")
            wait_for(browser, ["no such tag"], seconds=1)

    with pytest.raises(TimeoutError, match=r"lacks \['no such tag'\]"):
        visit()
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.fixture(scope="module")
def made_by_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two seeds; everything but the teacher was made by two workers at a time."""
    folder = tmp_path_factory.mktemp("workers")
    options = ["squeeze.epochs=2", "recover.iterations=20", "recover.ipc=4", "evaluate.seeds=[0,1]"]
    options += ["recover.snapshots=[0]", "attacks.epsilon=[16]", "attacks.max_images=20", "attacks.sanity_images=0"]
    done = guard(command(folder, *options, stage="squeeze"))
    assert done.returncode == 0, done.stderr
    for stage in ("recover", "relabel", "evaluate"):
        asked = command(folder, *options, stage=stage)
        workers = [start(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
        for worker in workers:
            said = worker.communicate(timeout=500)[1]
            assert worker.returncode == 0, said
    return folder / "runs/run"


def test_a_run_of_several_workers(made_by_workers: Path) -> None:
    check_run(made_by_workers)


def test_what_is_missing_on_the_page_is_named(made_by_workers: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made_by_workers, tmp_path / "run"))
    shutil.rmtree(run / "tensorboard/3_labels")
    with pytest.raises((AssertionError, TimeoutError), match="3_labels"):
        check_run(run, seconds=60)
