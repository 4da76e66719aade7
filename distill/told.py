"""A command or a job from its beginning to its end: every failure is told in one sentence and becomes an exit code."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from distill.environment import speaks
from distill.errors import Preempted, exit_code, sentence
from distill.say import say
from distill.training.preemption import preemptible


class Ended(NamedTuple):
    """How it ended.

    Attributes:
        code: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped by a signal and to be continued, 76 given up
            because another process of the run had ended.
        signal: the signal that has stopped it; None without one, or when another rank received it.
    """

    code: int
    signal: int | None = None


def told(work: Callable[[], int], *, debug: bool = False, last: bool = False) -> Ended:
    """Do some work that gives an exit code.

    Args:
        debug: let exceptions through.
        last: the process ends afterwards, see ``preemptible``.
    """
    if not debug:
        # A thread of TensorBoard that meets a full disk is heard of in the main thread, as one sentence.
        threading.excepthook = _heard_elsewhere
    try:
        with preemptible(last=last):
            return Ended(work())
    except Preempted as stopped:
        if speaks():
            say(f"guard: {stopped}")
        return Ended(stopped.exit_code, stopped.signal)
    except KeyboardInterrupt:
        say("guard: interrupted; the same command continues where it stopped.")
        return Ended(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Ended(1)
    except Exception as error:
        if debug:
            raise
        say(f"guard: {sentence(error)}")
        return Ended(exit_code(error))


def _heard_elsewhere(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer hands an OSError on to the main thread; any other failure of a thread is told here."""
    if failure.exc_value is not None and not isinstance(failure.exc_value, OSError):
        say(f"guard: in a thread: {sentence(failure.exc_value)}")
