"""``guard tensorboard``: a page while workers go on, or one sentence."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.report import serve
from distill.training.monitor import Monitor
from tests.running import start
from tests.training.test_worker_events import RECIPE, record

GUARD = [sys.executable, "-m", "distill", "tensorboard"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run under way with a teacher's curve and a worker on the labels."""
    (tmp_path / "config.yaml").write_text("{}\n")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/recipe.json").write_text(json.dumps({"recipe": RECIPE}))
    monitor = Monitor(tmp_path, "teacher")
    monitor.scalars(10, {"loss": 0.5})
    monitor.close()
    record(tmp_path, "a", 1000.0, [2.0])
    return tmp_path


def fetch(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"{address}data/plugin/scalars/{path}") as answer:
        return json.load(answer)


def test_a_run_under_way(run: Path, tmp_path: Path) -> None:
    """What a worker makes meanwhile comes to the page by itself."""
    with (tmp_path / "said").open("w") as said:
        server = start([*GUARD, str(run), "--port", "0"], stdout=said, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", (tmp_path / "said").read_text())):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        address, known, counts = found.group(), {}, []
        record(run, "a", 1000.0, [2.0, 3.0, 4.0])
        while counts != [0, 1, 2, 3]:
            assert time.monotonic() < deadline + serve.REFRESH, (known, counts)
            known = fetch(address, "tags")
            if "6_workers/3_labels/all" in known:
                query = "scalars?run=6_workers/3_labels/all&tag=6_workers/3_labels"
                counts = [value for _, _, value in fetch(address, query)]
            time.sleep(0.5)
        assert set(known) == {"1_teacher", "6_workers/3_labels/all", "6_workers/3_labels/a"}
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["tensorboard", *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("guard: ")
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_shown_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in sentence(capsys, str(tmp_path / "none"))
    (run / "inner").mkdir()
    assert "holds no run" in sentence(capsys, str(run / "inner"))
    (run / "inner/config.yaml").write_text("{}\n")
    assert "inner holds no events for TensorBoard" in sentence(capsys, str(run / "inner"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"could not bind to port {port}" in sentence(capsys, str(run), "--port", str(port))
    assert "cannot be served on 192.0.2.1: " in sentence(capsys, str(run), "--host", "192.0.2.1", "--port", "0")
    assert "cannot be served on 127.0.0.1: " in sentence(capsys, str(run), "--port", "99999")
