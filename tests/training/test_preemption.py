"""SIGTERM, SIGUSR1 and SIGUSR2: flags inside a training, an end at once elsewhere, nothing to forked workers."""

from __future__ import annotations

import copy
import linecache
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

from distill.errors import SIGNALS, Preempted
from distill.training.preemption import AGENT, deferred, preemptible
from tests.training.digits import finish, make

ALONE = "import os, time\nfrom distill.training import preemption\n"
HANGING = "import hashlib, sys, threading\nsys.setswitchinterval(1000)\n"
HANG = " threading.Timer(0.3, os.kill, (os.getpid(), 10)).start()\n hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
"""The timer's thread comes to its turn only where the main thread lets others run: in the foreign code, and not before
it on a machine that has kept it waiting.
"""


def send(number: int = signal.SIGUSR2) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_a_training_ends_the_work_at_once(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    reached = []

    @preemptible()
    def work() -> None:
        try:
            send(number)
            time.sleep(5)
            reached.append("the end")
        finally:
            send(signal.SIGTERM)
            send(number)
            reached.append("the clearing up")

    with pytest.raises(Preempted, match="the same command continues") as stopped:
        work()
    assert reached == ["the clearing up"]
    assert (stopped.value.exit_code, stopped.value.signal) == (75, number), "the first of them"
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_in_a_training_it_only_sets_a_flag() -> None:
    seen = []

    @preemptible()
    def work() -> None:
        with deferred() as told:
            seen.append(told())
            send()
            send(signal.SIGTERM)
            seen.append(told())
        seen.append(True)

    with pytest.raises(Preempted) as stopped:
        work()
    assert stopped.value.signal == signal.SIGUSR2
    assert pickle.loads(pickle.dumps(stopped.value)).signal == signal.SIGUSR2
    assert seen == [False, True]
    with preemptible(), deferred() as told:
        assert not told()


def test_a_stop_that_another_rank_was_told_carries_no_signal() -> None:
    @preemptible()
    def work(told: bool) -> None:
        with deferred():
            if told:
                send(signal.SIGUSR1)
            raise Preempted

    for told in (False, True):
        with pytest.raises(Preempted) as stopped:
            work(told)
        assert stopped.value.signal == (signal.SIGUSR1 if told else None)


def test_a_signal_inside_a_finaliser_ends_the_work_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    """Python drops what is raised there and prints it: a progress bar that was being collected swallowed one."""

    class Collected:
        def __del__(self) -> None:
            send()
            time.sleep(0.01)

    @preemptible()
    def work() -> None:
        collected = Collected()
        del collected
        time.sleep(30)

    began, hook = time.monotonic(), sys.unraisablehook
    with pytest.raises(Preempted):
        work()
    assert time.monotonic() - began < 15
    assert sys.unraisablehook is hook
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_that_copy_drops_ends_the_work_all_the_same() -> None:
    """``copyreg._slotnames`` sets an attribute under ``except: pass``; an attack that copied its model went on."""

    class Setting(type):
        def __setattr__(cls, name: str, value: object) -> None:
            send()
            time.sleep(0.01)

    class Copied(metaclass=Setting):
        pass

    reached = []

    @preemptible()
    def work() -> None:
        copy.copy(Copied())
        reached.append("the next line")
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(Preempted) as stopped:
        work()
    assert reached, "it was not dropped"
    assert stopped.value.signal == signal.SIGUSR2
    assert time.monotonic() - began < 15


def test_other_failures_inside_a_finaliser_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Collected:
        def __del__(self) -> None:
            raise OSError("full")

    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    with preemptible():
        collected = Collected()
        del collected
    assert told == ["full"]


def test_what_fails_on_its_own_is_told_as_it_is() -> None:
    @preemptible()
    def work() -> None:
        with deferred():
            send()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        work()


def test_the_last_block_of_a_process_lets_no_second_signal_through() -> None:
    script = ALONE + "try:\n with preemption.preemptible(last=True):\n  os.kill(os.getpid(), 15)\n"
    script += "except preemption.Preempted as stopped:\n os.kill(os.getpid(), 12)\n raise SystemExit(stopped.exit_code)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 75


def test_a_process_that_hangs_in_foreign_code_ends_all_the_same() -> None:
    """As a rank that waits for others inside a collective: Python's handlers do not run there."""
    script = f"{ALONE}{HANGING}preemption.GRACE = 1\nwith preemption.preemptible():\n{HANG}"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stderr == f"guard: {Preempted()}\n"
    assert time.monotonic() - began < 40


def test_a_training_that_hangs_after_a_signal_ends_too() -> None:
    """Its other ranks may be on a machine that is gone; without a signal it waits for them."""
    script = f"{ALONE}{HANGING}preemption.GRACE, preemption.PATIENCE = 60, 1\n"
    script += (
        f"with preemption.preemptible(), preemption.deferred() as told:\n time.sleep(2)\n assert not told()\n{HANG}"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, f"guard: {Preempted()}\n")
    assert time.monotonic() - began < 40


def test_forked_workers_die_of_signals_and_their_parent_hears_nothing() -> None:
    context = multiprocessing.get_context("fork")
    with preemptible():
        workers = [context.Process(target=time.sleep, args=(60,)) for _ in SIGNALS]
        for worker, number in zip(workers, SIGNALS, strict=True):
            worker.start()
            os.kill(worker.pid or 0, number)
        for worker in workers:
            worker.join(20)
        time.sleep(0.1)
    assert [worker.exitcode for worker in workers] == [-number for number in SIGNALS]


def test_a_signal_in_the_middle_of_a_fork_is_not_lost() -> None:
    """Python raises nothing there: an exception would be printed and forgotten."""
    # Hooks before a fork run in reverse order: this one while the signals are blocked.
    script = ALONE + "os.register_at_fork(before=lambda: os.kill(os.getpid(), 12))\n"
    script += "try:\n with preemption.preemptible():\n  os.fork() or os._exit(0)\n  time.sleep(60)\n"
    script += "except preemption.Preempted as stopped:\n raise SystemExit(stopped.exit_code)"
    began = time.monotonic()
    # Python 3.12 warns of every fork beside threads.
    quiet = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(quiet, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, "")
    assert time.monotonic() - began < 40


def test_a_signal_that_another_thread_catches_wakes_the_main_thread() -> None:
    """The kernel may give it to any thread; Python's handler runs in the main one, which nothing would wake."""
    script = ALONE + "import signal, threading\ntry:\n with preemption.preemptible():\n"
    script += "  signal.pthread_sigmask(signal.SIG_BLOCK, [12])\n"
    script += "  with open('/proc/self/status') as status:\n   assert 'SigBlk:\\t0000000000000800' in status.read()\n"
    script += "  preemption._state.thread.is_alive() and os.kill(os.getpid(), 12)\n  time.sleep(60)\n"
    script += "except preemption.Preempted as stopped:\n raise SystemExit(stopped.exit_code)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, "")
    assert time.monotonic() - began < 40


def test_a_signal_just_after_the_work_is_told_like_any_other() -> None:
    sent = []

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if frame.f_code.co_name == "preemptible" and event == "line" and line == "state.deferred = True":
            sys.settrace(None)
            sent.append(line)
            send()
        return trace

    before = [signal.getsignal(each) for each in SIGNALS]
    try:
        with pytest.raises(Preempted), preemptible():
            sys.settrace(trace)
    finally:
        sys.settrace(None)
    assert len(sent) == 1
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_another_thread_leaves_the_signals_alone() -> None:
    seen = []

    def work() -> None:
        with preemptible(), deferred() as told:
            seen.append((told(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def worker_of_an_agent(worker: str) -> tuple[subprocess.Popen[str], int]:
    """A process that stands for torchrun's agent, and the id of its worker, which prints that first."""
    agent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {ALONE + worker!r}])"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    process = subprocess.Popen([sys.executable, "-c", agent], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_it_ends_with_the_agent_that_started_it() -> None:
    """A worker of a killed agent would hold the lock of the run folder until it is done."""
    worker = "with preemption.preemptible():\n print(os.getpid(), flush=True)\n time.sleep(60)"
    process, orphan = worker_of_an_agent(worker)
    process.kill()
    process.wait()
    assert process.stdout is not None
    # The pipe closes when its last writer ends.
    began = time.monotonic()
    assert process.stdout.read() == ""
    process.stdout.close()
    assert time.monotonic() - began < 40
    assert not Path(f"/proc/{orphan}/exe").exists()


@pytest.mark.parametrize(("seconds", "said"), [(3, "saved\n"), (60, "")])
def test_a_signal_for_the_agent_too_is_answered_first(seconds: int, said: str) -> None:
    """Plain torchrun dies of SIGUSR2. The training still saves, unless it never comes to that."""
    worker = f"preemption.ANSWER = {10 if said else 1}\n"
    worker += "with preemption.preemptible(), preemption.deferred() as told:\n print(os.getpid(), flush=True)\n"
    worker += f" while not told(): time.sleep(0.1)\n time.sleep({seconds})\n print('saved', flush=True)"
    process, orphan = worker_of_an_agent(worker)
    # It stands still, so that it finds the agent dead before it can hear the signal.
    os.kill(orphan, signal.SIGSTOP)
    process.send_signal(signal.SIGUSR2)
    process.wait()
    time.sleep(0.6)
    os.kill(orphan, signal.SIGUSR2)
    os.kill(orphan, signal.SIGCONT)
    assert process.stdout is not None
    began = time.monotonic()
    assert process.stdout.read() == said
    process.stdout.close()
    assert time.monotonic() - began < 40


def test_an_agent_that_ended_before_its_worker_had_begun_is_found_out() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for agent, seconds, code in ((gone.pid, 50, 75), (os.getpid(), 3, 0)):
        script = f"{ALONE}with preemption.preemptible():\n time.sleep({seconds})\n raise SystemExit(0)"
        environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test", AGENT: str(agent)}
        assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=60).returncode == code


@pytest.mark.parametrize("stop", [0, 1, 17, 30, 50])
def test_a_stopped_training_goes_on_where_it_was(tmp_path: Path, stop: int) -> None:
    """Two more signals come during the save."""
    whole = finish(*make(tmp_path / "whole", minutes=60))
    engine, loader, checkpoint = make(tmp_path / "parts", minutes=60)
    forward, save = engine.task.forward, engine.save

    def forward_and_signal(batch):
        if engine.step_count == stop:
            send()
        return forward(batch)

    def save_and_signal(folder):
        send(signal.SIGTERM)
        save(folder)
        send(signal.SIGUSR1)

    engine.task.forward, engine.save = forward_and_signal, save_and_signal
    with pytest.raises(Preempted), preemptible():
        finish(engine, loader, checkpoint)
    (kept,) = (tmp_path / "parts").iterdir()
    # The flag is asked for before a step and answered after it, so that the answer costs no time.
    assert engine.step_count in (stop + 1, min(stop + 2, 51))
    assert kept.name == f".checkpoint-{engine.step_count:08d}"
    again = make(tmp_path / "parts", minutes=60)
    ended = finish(*again)
    assert again[0].task.calls == 51 - engine.step_count
    assert all(torch.equal(whole[name], ended[name]) for name in whole)
