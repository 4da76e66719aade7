"""SIGTERM, SIGUSR1 or SIGUSR2 at any moment, then the same command: as if nothing had happened, and nothing lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import prepare
from distill.compose import compose
from distill.data.streaming import read_batches
from distill.errors import SIGNALS, Preempted
from tests.resume.interruption import MOMENTS, same, start, wait_for
from tests.running import Standstill, Started, command, environment


def stopped(process: Started, folder: Path) -> str:
    """Assert that a run has ended as it should after a signal; returns what it wrote, and clears the log."""
    code, log = process.wait(timeout=200), (folder / "log").read_text()
    (folder / "log").unlink()
    assert code == Preempted.exit_code, log
    assert log.splitlines()[-1] == f"guard: {Preempted()}"
    assert "Traceback" not in log
    return log


def test_stopped_in_one_stage_after_the_other(whole: tuple[Path, float], tmp_path: Path) -> None:
    """Before the first step, in recovery, between two stages and during the attacks; more signals follow at once."""
    limit = Standstill(tmp_path)
    moments = [("config.yaml", "teacher/manifest.json"), MOMENTS["recover"]]
    moments += [("labels/manifest.json", "student/manifest.json"), MOMENTS["evaluate"]]
    for number, (pattern, end) in enumerate(moments):
        limit.before(end)
        process = start(tmp_path, limit=limit)
        wait_for(process, tmp_path, pattern)
        for each in (number, number + 1, number + 1):
            process.send_signal(SIGNALS[each % len(SIGNALS)])
        limit.go_on()
        stopped(process, tmp_path)
        assert not (tmp_path / "runs/run/results.json").exists()
    process = start(tmp_path)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    same(tmp_path, whole[0])


def test_a_signal_to_the_whole_group_spares_the_workers_that_read(tmp_path: Path) -> None:
    """Schedulers signal every process: the step under way still gets its batch, and no worker stays behind."""
    options = ["loader=folder", "dataset.stored_size=0", "squeeze.epochs=3"]
    arguments, limit = command(tmp_path, *options, stage="squeeze"), Standstill(tmp_path)
    limit.before(".checkpoint-*", 10)
    process = start(tmp_path, [*arguments, "monitor.checkpoint_minutes=0.02"], limit=limit)
    limit.reached(process)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGUSR2)
    limit.go_on()
    step = int(re.findall(r"squeeze: (\d+)/60", stopped(process, tmp_path))[-1])
    assert 10 <= step < 60
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    process = start(tmp_path, arguments)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert f"squeeze: {step}/60 step\n" in (tmp_path / "log").read_text(), "not a single step is lost"


STARTING = """
import os, sys
import numpy as np
from data_prep import prepare
from distill.compose import compose
from distill.data.streaming import read_batches
from distill.errors import SIGNALS
from distill.training.preemption import deferred, preemptible

samples = prepare(compose(["dataset=digits", f"data_root={sys.argv[1]}"])).samples("train", max_per_class=5)
with preemptible(), deferred() as told:
    os.register_at_fork(after_in_child=lambda: [os.kill(os.getpid(), number) for number in SIGNALS])
    shares = np.array_split(np.arange(50), 4)
    print(sum(len(images) for images in read_batches(samples, 0, 32, shares, None, 0, 2, False)), told())
"""


def test_a_signal_spares_workers_that_are_only_starting(tmp_path: Path) -> None:
    """In the moment after the fork."""
    script = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", STARTING, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment(), timeout=100)
    assert done.stdout == "50 False\n", done.stderr


def test_a_worker_that_hangs_does_not_outlive_the_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores SIGTERM, and Python would wait for it at its end."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3)
    samples = prepare(compose(["dataset=digits", f"data_root={tmp_path}"])).samples("train", max_per_class=10)
    batches = read_batches(samples, 0, 32, np.array_split(np.arange(100), 20), None, 0, 2, False)
    next(batches)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid or 0, signal.SIGSTOP)
    batches.close()
    assert multiprocessing.active_children() == []
    assert not set(SIGNALS) & before


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("number", range(12))
def test_stopped_at_random_moments(whole: tuple[Path, float], tmp_path: Path, number: int) -> None:
    """Up to four times in one run, by two signals at a random distance."""
    folder, seconds = whole
    moments = random.Random(number)
    for _ in range(4):
        process = start(tmp_path, fresh=True)
        try:
            process.wait(timeout=moments.uniform(0, 0.95) * seconds)
        except subprocess.TimeoutExpired:
            first = moments.choice(SIGNALS)
            process.send_signal(first)
            time.sleep(moments.choice([0, 0.001, 0.01, 0.1]))
            process.send_signal(moments.choice(SIGNALS))
            if process.wait(timeout=60) == 0:
                break  # It was done when the signals came.
            if process.returncode < 0:
                # Python was still starting: nothing had been begun.
                assert (tmp_path / "log").read_text() == ""
                continue
            stopped(process, tmp_path)
    again = start(tmp_path, fresh=True)
    assert again.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    same(tmp_path, folder)
