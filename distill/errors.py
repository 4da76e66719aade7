"""Errors that are told to the user as one sentence, without a traceback.

Raise one of these when the cause is outside the code: a wrong option, a broken file, a full disk. The sentence
names the thing and the way out. Any other exception is a bug, and the command line says so.
"""

import errno
import signal
import traceback
from pathlib import Path


class GuardError(Exception):
    """The run cannot go on; the message is one sentence for the user. Exit code 1."""

    exit_code = 1


class ConfigError(GuardError):
    """The command or the configuration is wrong; nothing was started. Exit code 2."""

    exit_code = 2


class DataError(GuardError):
    """A data set, image or archive is missing, broken or not what its manifest says. Exit code 1."""


class ArtifactError(GuardError):
    """A folder of a run is damaged, or was made with another configuration. Exit code 1."""


class NonFiniteError(GuardError):
    """A loss became NaN or infinite; the message names step and term. Exit code 1."""


class MissingPackageError(GuardError):
    """An optional package is needed and not installed; the message holds the install line. Exit code 1."""


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""They ask a run to stop so that the same command continues it."""


class Preempted(GuardError):
    """A signal has stopped the run, and nothing is lost. Exit code 75, for launchers: start the same command again.

    Attributes:
        signal: the first that came to this process; None when only another rank has received one.
    """

    exit_code = 75

    def __init__(self, signal: int | None = None) -> None:
        super().__init__("stopped by a signal; what was done is kept, and the same command continues.")
        self.signal = signal

    def __reduce__(self) -> tuple[type, tuple[int | None]]:
        return type(self), (self.signal,)


def sentence(error: BaseException) -> str:
    """What a failure is called on the terminal: one sentence, for a bug too."""
    if isinstance(error, GuardError):
        return str(error)
    if isinstance(error, OSError):
        place = f" at {error.filename}" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"No space is left on the device{place}; free some and run the same command again."
        return f"{error.strerror or error}{place}; what is finished is kept, the same command continues."
    if lost_another(error):
        return "Another process of this run has ended; the same command continues from what is saved."
    if "out of memory" in str(error):
        return f"The GPU is out of memory ({str(error).splitlines()[0]}); use smaller batches or more accumulation."
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {text}. --debug shows the traceback."


LOST_ANOTHER = 76
"""Exit code of a process that stopped because another one had ended, whose code says why."""


def exit_code(error: BaseException) -> int:
    """The exit code of a failure: a GuardError's own, 76 when another process of the run had ended, otherwise 1."""
    if isinstance(error, GuardError):
        return error.exit_code
    return LOST_ANOTHER if lost_another(error) else 1


LOST = (
    "closed by peer",  # gloo
    "reset by peer",
    "broken pipe",
    "closed by remote peer",  # NCCL
    "remote process",
    "connection was likely closed",  # torch's store
    "connection refused",
    "connection timed out",
    "no route to host",
)
"""What gloo, NCCL and torch say, in some spelling, when another process has ended or its machine is gone."""


def lost_another(error: BaseException) -> bool:
    """Whether a collective or the store found a connection closed."""
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in LOST)
