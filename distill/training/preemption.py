"""SIGTERM, SIGUSR1 and SIGUSR2 ask a run to stop so that the same command continues it.

Inside ``deferred`` a signal only sets a flag, which a training answers between two steps. Elsewhere every finished
piece is on disk already, and the signal ends the work at once, as Ctrl-C does. Further signals change nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from distill.environment import speaks
from distill.errors import SIGNALS, Preempted

GRACE = 10.0
"""Seconds in which a process that was told to stop must have ended; it may wait for other ranks inside C++ code."""
ANSWER = 30.0
"""Seconds that a training which was told to stop has for it when torchrun's agent is gone: the signal was for both."""
PATIENCE = 120.0
"""Seconds that such a training has in any case; it may wait for a rank whose machine is gone."""
POLL = 0.5
AGENT = "GUARD_AGENT"
"""Environment variable with the process id of the launcher that starts the ranks."""


class _Stop(KeyboardInterrupt):
    """Raised by the handler; not an Exception, so that few on the way swallow it."""


class _State:
    """The signals of this process while it can be preempted."""

    def __init__(self) -> None:
        self.requested, self.deferred = False, True
        self.number: int | None = None
        self.forking = False
        self.raised: weakref.ref[_Stop] | None = None
        self.hook = sys.unraisablehook
        self.ended = threading.Event()
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.thread = threading.Thread(target=self._watch, args=(_agent(),), daemon=True, name="preemption")

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        if self.forking and not self.deferred:
            # Nothing can be raised there: the thread sends the signal again.
            return
        self._note(number)
        self.requested = True
        if not self.deferred:
            raise self._stop()

    def _stop(self) -> _Stop:
        """One that is watched: Python drops it in finalisers, and ``copyreg``, which serves ``copy`` and ``pickle``,
        does by its ``except: pass``. When it is no more and the work goes on, the thread sends the signal again.
        """
        stop = _Stop()
        self.raised = weakref.ref(stop, self._dropped)
        return stop

    def _dropped(self, stop: weakref.ref[_Stop]) -> None:
        self.requested = False

    def _note(self, *numbers: int) -> None:
        """Keep the first: the thread sends SIGTERM in place of another that could not be answered."""
        if self.number is None:
            self.number = next((number for number in numbers if number in SIGNALS), None)

    def unraisable(self, failure: Any) -> None:
        """Python's hook for what cannot be raised, as in a finaliser; of a signal there is nothing to tell."""
        if failure.exc_type is not _Stop:
            self.hook(failure)

    def resume(self) -> None:
        self.deferred = False
        if self.requested:
            raise self._stop()

    def _watch(self, agent: int | None) -> None:
        """End this process where its main thread cannot: the handler runs only between two steps of Python code."""
        told, training, waited, orphaned = False, self.deferred, 0.0, 0.0
        while not self.ended.is_set():
            began = time.monotonic()
            if select.select([self.reader], [], [], POLL)[0]:
                numbers = os.read(self.reader, 512)
                self._note(*numbers)
                told |= any(number in SIGNALS for number in numbers)
            elif told and not self.requested and not self.forking:
                # Another thread has caught it, and the main thread sleeps on; or it was in the middle of a fork.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            # No more than a look: what has stood still, as a job that Slurm suspends, has yet to hear what it was told.
            elapsed, stopping = min(time.monotonic() - began, POLL), told or self.requested
            if training != self.deferred:
                training, waited = self.deferred, 0.0
            waited = waited + elapsed if stopping else 0.0
            # Nobody would end an orphan, and the lock that it holds keeps the next start out.
            orphaned = orphaned + elapsed if agent is not None and os.getppid() != agent else 0.0
            if waited > (PATIENCE if training else GRACE) or orphaned > (ANSWER if stopping else POLL):
                if stopping and speaks():
                    os.write(2, f"guard: {Preempted()}\n".encode())
                os._exit(Preempted.exit_code)

    def end(self) -> None:
        self.ended.set()
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\0")
        self.thread.join()

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


_state: _State | None = None
_masks = threading.local()


@contextlib.contextmanager
def preemptible(*, last: bool = False) -> Iterator[None]:
    """Answer the signals inside the block; before and after it, and in other threads, they are what they were.

    Under torchrun the process also ends when its agent has died. Inside another such block this one does nothing.

    Args:
        last: the process ends after the block: from then on it ignores the signals.

    Raises:
        Preempted: when a signal has come.
    """
    global _state
    if _state is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    state = _state = _State()
    before: dict[signal.Signals, Any] = {}
    _guard_forks()
    state.thread.start()
    wakeup = signal.set_wakeup_fd(state.writer, warn_on_full_buffer=False)
    sys.unraisablehook = state.unraisable
    try:
        try:
            for number in SIGNALS:
                before[number] = signal.signal(number, state.receive)
            state.resume()
            yield
        finally:
            # A signal just before this is raised here, where the block around catches it.
            state.deferred = True
    except _Stop:
        raise Preempted(state.number) from None
    finally:
        # The thread, which may send a signal again, ends before the handlers do.
        state.end()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = state.hook
        state.close()
        _state = None


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Inside the block a signal only sets a flag; gives the function that reads it.

    Raises:
        Preempted: at the end of the block, when a signal has come.
    """
    state = _state
    if state is None or state.deferred or threading.current_thread() is not threading.main_thread():
        yield lambda: state is not None and state.requested
        return
    state.deferred = True
    try:
        yield lambda: state.requested
    except Preempted as stopped:
        # The signal may have come to another rank only.
        state.requested, stopped.signal = True, state.number
        raise
    finally:
        state.deferred = False
    if state.requested:
        raise Preempted(state.number)


def _agent() -> int | None:
    """The process id of torchrun's agent, when it started this process.

    One that has ended already left this process another parent, and plain torchrun does not say who it was.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    known = os.environ.get(AGENT)
    if known and not os.path.exists(f"/proc/{known}/exe"):
        return int(known)
    return os.getppid()


_guarded = False


def _guard_forks() -> None:
    """Forked workers must not share the handlers, which would write into the pipe of their parent."""
    global _guarded
    if not _guarded:
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_begin_child)
        _guarded = True


def _before_fork() -> None:
    if _state is not None:
        _state.forking = True
        _masks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    mask = _masks.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if _state is not None:
        _state.forking = False


def _begin_child() -> None:
    global _state
    if _state is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _state = None
    _after_fork()
