"""``guard recover`` by several lone processes, ``guard status`` and ``guard verify``, on a real run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.cli import main
from distill.files import read_json, write_json
from distill.sharing import artifact_state
from tests.running import Standstill, Started, command, contents, guard, start

UNITS = 6
OPTIONS = ["squeeze.epochs=1", f"recover.ipc={UNITS}", "recover.iterations=40", "monitor.tensorboard=false"]


def recover(folder: Path, *more: str, limit: Standstill | None = None, fresh: bool = False) -> Started:
    """A worker of its own on a run."""
    asked, variables = command(folder, *OPTIONS, *more, stage="recover"), limit.variables if limit else {}
    return start(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, fresh=fresh, **variables)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    # In this process, for another one takes longer to start than to train.
    assert main(command(folder, *OPTIONS, stage="squeeze")[3:]) == 0
    return folder


@pytest.fixture(scope="module")
def seen(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """What one worker makes, its process id, and the status while it was at work."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(teacher, folder, dirs_exist_ok=True)
    limit = Standstill(folder)
    limit.before("distilled/unit_00002.safetensors")
    worker = recover(folder, limit=limit, fresh=True)
    # At rest in its third unit, so that the status is that.
    limit.reached(worker)
    with contextlib.redirect_stdout(io.StringIO()) as status:
        assert main(["status", str(folder / "runs")]) == 0
    limit.go_on()
    output, said = worker.communicate(timeout=100)
    assert worker.returncode == 0, said
    assert "recover (distilled) complete" in output
    assert f"recover: 0/{40 * UNITS} iteration" in said
    return folder, worker.pid, status.getvalue()


@pytest.fixture(scope="module")
def alone(seen: tuple[Path, int, str]) -> Path:
    """The folder of that."""
    return seen[0]


def wait_for(worker: Started, folder: Path, pattern: str, holds: str = "") -> None:
    """Wait until a file is there that holds a text; the worker must not end before."""
    deadline = time.monotonic() + 120
    while not any(holds in path.read_bytes().decode(errors="replace") for path in folder.glob(pattern)):
        assert worker.poll() is None, worker.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def finished(alone: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    shutil.copytree(alone / "runs/run", tmp_path / "run")
    return tmp_path / "run"


def same(folder: Path, alone: Path) -> None:
    """Assert that two distilled sets are equal, byte for byte."""
    mine, theirs = (contents(each / "runs/run/distilled") for each in (folder, alone))
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert len(theirs) == UNITS + 2


def begun(folder: Path) -> tuple[Started, Standstill]:
    """A worker that has begun, and stands still before its first unit; it takes long to start."""
    limit = Standstill(folder / f"limit-{secrets.token_hex(4)}")
    limit.before(".claims/unit_*")
    return recover(folder, limit=limit), limit


def killed(folder: Path, worker: Started) -> None:
    """Kill a worker in the middle of a unit."""
    run = folder / "runs/run"
    wait_for(worker, run / "distilled", ".claims/unit_*", f"-{worker.pid}-")
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    assert not (run / "distilled/manifest.json").exists()


def complete(folder: Path, alone: Path, second: Started, third: Started) -> None:
    """Assert that these two, another being dead, have made what one worker makes, and that all is noted once."""
    run = folder / "runs/run"
    outputs = [each.communicate(timeout=500) for each in (second, third)]
    assert [second.returncode, third.returncode] == [0, 0], outputs
    assert sum("recover (distilled) complete" in output for output, _ in outputs) >= 1, outputs
    same(folder, alone)
    workers = artifact_state(run, "distilled").workers
    assert sorted(worker.state for worker in workers) == ["dead", "ended", "ended"]
    entries = json.loads((run / "provenance.json").read_text())["distilled"]
    assert [entry["worker"] for entry in entries] == [worker.worker for worker in workers]
    assert sum(entry["units"] for entry in entries) == UNITS
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == len((alone / "runs/run/metrics.jsonl").read_text().splitlines()), "written once"


def test_two_workers_a_kill_and_one_more(teacher: Path, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path, dirs_exist_ok=True)
    crew = [begun(tmp_path) for _ in range(3)]
    for worker, limit in crew:
        limit.reached(worker)
    (first, limit), *others = crew
    # It may come so far, however late the kill comes.
    limit.go_on("distilled/unit_00004.safetensors")
    killed(tmp_path, first)
    for _, limit in others:
        limit.go_on()
    complete(tmp_path, alone, *(worker for worker, _ in others))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_workers_thirty_seconds_apart(teacher: Path, tmp_path: Path) -> None:
    """As long as it takes on a busy machine: units of several seconds, each of them in flight when the kill comes."""
    slow = ["recover.iterations=800"]
    OPTIONS.extend(slow)
    try:
        for name in ("alone", "several"):
            shutil.copytree(teacher, tmp_path / name)
        done = guard(command(tmp_path / "alone", *OPTIONS, stage="recover"))
        assert done.returncode == 0, done.stderr
        several = tmp_path / "several"
        first = recover(several)
        time.sleep(30)
        second = recover(several)
        killed(several, first)
        complete(several, tmp_path / "alone", second, recover(several))
    finally:
        del OPTIONS[-len(slow) :]


def test_status_of_work_under_way(seen: tuple[Path, int, str]) -> None:
    _, pid, shown = seen
    assert "teacher   complete" in shown
    line = next(line for line in shown.splitlines() if "distilled" in line)
    assert f" of {UNITS} units done, 1 in progress, " in line
    assert "units an hour, about " in line
    row = next(line for line in shown.splitlines() if f"-{pid}-" in line)
    assert " alive " in row
    assert "unit_0000" in row
    assert "labels    not begun" in shown
    assert "results   not there" in shown


def verified(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What guard verify finds wrong."""
    code = main(["verify", str(run)])
    shown = capsys.readouterr()
    faults = [line.removeprefix("guard: ") for line in shown.err.splitlines()]
    assert code == (1 if faults else 0)
    assert f"{run / 'distilled'}: " in shown.out
    return faults


def test_verify_finds_every_damage(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(finished, capsys) == []
    distilled = finished / "distilled"
    unit, other = distilled / "unit_00003.safetensors", distilled / "unit_00005.safetensors"
    content = bytearray(unit.read_bytes())
    content[-1] ^= 1
    unit.write_bytes(content)
    other.unlink()
    (distilled / "notes.txt").write_text("mine")
    faults = verified(finished, capsys)
    assert len(faults) == 3
    assert faults[0].startswith(f"{unit} is not what ")
    assert faults[1].startswith(f"{other} is missing")
    assert faults[2].startswith(f"{distilled / 'notes.txt'} is no part of ")


def test_verify_reads_the_manifests_and_what_was_made_from_what(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "distilled/manifest.json"
    manifest = read_json(path)
    write_json(path, {**manifest, "teacher_top1": 1.5})
    (fault,) = verified(finished, capsys)
    assert fault.startswith(f"{path} is not what its own fingerprint says")
    write_json(path, manifest)
    teacher = finished / "teacher/manifest.json"
    write_json(teacher, {**read_json(teacher), "fingerprint": "0" * 64})
    faults = verified(finished, capsys)
    assert len(faults) == 2
    assert faults[1].startswith(f"{finished / 'distilled'} was made from the teacher of fingerprint ")
    path.unlink()
    unit = finished / "distilled/unit_00000.safetensors"
    unit.write_bytes(unit.read_bytes()[:-1])
    assert verified(finished, capsys)[1].startswith(f"{unit} is truncated")


def test_a_lease_that_no_worker_could_keep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recover", "sharing.lease=0.001"]) == 2
    assert "sharing.lease=0.001 must be at least 10" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("status", "verify"):
        assert main([name, str(tmp_path)]) == 1
        assert "holds no run" in capsys.readouterr().err


def test_a_run_from_the_time_before_workers(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(finished / "workers")
    assert main(["status", str(finished)]) == 0
    assert "distilled complete\n" in capsys.readouterr().out
    assert verified(finished, capsys) == []


@pytest.mark.slow
def test_four_workers_of_forty_units_stay_busy(teacher: Path, tmp_path: Path) -> None:
    """Real units, one core or half a core for each worker."""
    shutil.copytree(teacher, tmp_path, dirs_exist_ok=True)
    workers = [recover(tmp_path, "recover.ipc=40", "recover.iterations=150") for _ in range(4)]
    for worker in workers:
        _, said = worker.communicate(timeout=500)
        assert worker.returncode == 0, said
    state = artifact_state(tmp_path / "runs/run", "distilled")
    print("busy:", " ".join(f"{100 * worker.busy:.1f} %" for worker in state.workers), file=sys.stderr)
    assert min(worker.busy for worker in state.workers) >= 0.95
    assert sum(worker.made for worker in state.workers) == 40
