"""``python -m launchers.torchrun N run key=value …``: a ``guard`` command in N processes on each machine.

The same as ``torchrun --standalone --nproc_per_node=N -m distill run key=value …``, except that the CPU cores are
divided among the processes (torchrun gives each of them one thread), that SIGTERM, SIGUSR1 and SIGUSR2 are passed on
to the processes, and that the exit code is theirs: 75 after such a signal, when the same command continues. When a
process was killed, or another machine is gone, all start again from the latest checkpoint, ``--max-restarts`` times.

On several machines, the same command on each: ``--nnodes=2 --rdzv-endpoint=HOST:PORT``, HOST being one of them.
docs/torchrun.md tells what happens when one is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from distill.errors import LOST_ANOTHER, SIGNALS, Preempted
from distill.say import say
from distill.training.preemption import AGENT

RESTARTS = 3
WAIT = 600
"""Seconds that a machine waits for the others, at the start and when one was lost."""
LINGER = 5.0
"""Seconds that a machine waits after the end for those that still ask it about the rendezvous."""


def arguments(given: argparse.Namespace) -> list[str]:
    """The options of torchrun and the command."""
    where = ["--standalone"]
    if given.nnodes > 1:
        where = [f"--nnodes={given.nnodes}", "--rdzv-backend=c10d"]
        where += [f"--rdzv-endpoint={given.rdzv_endpoint}", f"--rdzv-id={given.rdzv_id or 'guard'}"]
        where += [f"--local-addr={given.local_addr}"] if given.local_addr else []
        here = hosts(given.rdzv_endpoint)
        told = "" if here is None else f",is_host={int(here)}"
        # An agent outlives a cut of the network as long as the others wait for it.
        where += [f"--rdzv-conf=join_timeout={WAIT},read_timeout={WAIT}{told}"]
    count = [f"--max-restarts={given.max_restarts}", f"--nproc_per_node={given.processes}"]
    return [*where, *count, "-m", "distill", *given.command]


def hosts(endpoint: str) -> bool | None:
    """Whether machines that meet at HOST:PORT meet on this one; None: torch finds it out by the name of the machine.

    It does not know the addresses of further interfaces.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError):
        return None
    if host == socket.gethostname() or ipaddress.ip_address(address[0]).is_loopback:
        return None
    with socket.socket(kind) as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind(address)
        except OSError:
            # It is another machine's, or another launcher of this one was first.
            return False
    return True


def threads(processes: int, cores: int) -> int:
    """CPU threads of each process."""
    return max(1, cores // processes)


def main() -> int:
    """Start the processes and wait for them.

    Returns:
        0 when all are done, 75 when all have stopped for a signal, otherwise the exit code of a failure.
    """
    given = _parse()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(given.processes, len(os.sched_getaffinity(0)))))
    relay = Relay()
    try:
        return _launch(given, relay)
    finally:
        relay.end()


class Relay:
    """Passes SIGTERM, SIGUSR1 and SIGUSR2 on to the child processes of this one."""

    def __init__(self) -> None:
        self.told: int | None = None
        self.ended = threading.Event()
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def end(self) -> None:
        """Pass on no more."""
        self.ended.set()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.told = self.told is None, number
        if not children(os.getpid()):
            # The processes are not there yet, or no longer.
            say(f"guard: {Preempted()}")
            raise SystemExit(Preempted.exit_code)
        if first:
            threading.Thread(target=self._pass_on, args=(number,), daemon=True).start()

    def _pass_on(self, number: int) -> None:
        # Again and again, for a process that is only starting may miss one; further signals change nothing.
        while not self.ended.is_set():
            for child in children(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
            self.ended.wait(1)


def children(process: int) -> list[int]:
    """The ids of the child processes of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name before it may hold spaces and brackets.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process and state != "Z":
                found.append(int(folder.name))
    return found


def _launch(given: argparse.Namespace, relay: Relay) -> int:
    os.environ[AGENT] = str(os.getpid())
    # Stack traces of connections that close, at every restart.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import parse_args, run

    if given.nnodes > 1:
        # Else a machine that comes in place of a lost one waits for an address that was told to the first ones only.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    started = _watch_failures(relay)
    # The agent would end the processes instead of passing these on; what went wrong they have said themselves.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    logging.disable(logging.ERROR)
    try:
        run(parse_args(arguments(given)))
    except ChildFailedError as error:
        code = exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, relay.told)
        if given.nnodes > 1:
            time.sleep(LINGER)
        return code
    except SignalException:
        return 1
    except (RendezvousClosedError, RendezvousConnectionError) as error:
        if relay.told is not None:
            return Preempted.exit_code
        if not started:
            say(f"guard: cannot meet at {given.rdzv_endpoint}: {' '.join(str(error).split())}")
            return 1
        lost = f"The machine of {given.rdzv_endpoint}, where all meet, is gone"
        lost = "Another machine of this run has ended" if isinstance(error, RendezvousClosedError) else lost
        say(f"guard: {lost}; the same command on every machine continues.")
        return LOST_ANOTHER
    except RendezvousTimeoutError:
        say(f"guard: fewer than {given.nnodes} machines came; start the same command on each.")
        return LOST_ANOTHER if started else 1
    except Exception as error:
        say(f"guard: torchrun has failed: {' '.join(str(error).split())}")
        return 1 if relay.told is None else Preempted.exit_code
    return 0


def _watch_failures(relay: Relay) -> list[bool]:
    """Let the agent start processes again only when they were killed or have lost others.

    What has failed with a sentence of its own would say it once more, and what was told to stop has stopped.

    Returns:
        A list that has grown when processes were started.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    started: list[bool] = []

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, *arguments: Any, **named: Any) -> Any:
            result = super()._monitor_workers(*arguments, **named)
            if result.is_failed():
                codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
                _, killed, lost = judge(codes, relay.told)
                if relay.told is not None or not (killed or lost):
                    self._remaining_restarts = 0
                elif self._remaining_restarts:
                    what, times = f"killed: {killed}; " if killed else "", self._remaining_restarts
                    again = f"starting again from what is saved, the first of at most {times} times"
                    say(f"guard: {what}{again}.")
            return result

        def _start_workers(self, *arguments: Any, **named: Any) -> Any:
            started.append(True)
            return super()._start_workers(*arguments, **named)

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    return started


def exit_code(codes: Mapping[int, int], told: int | None) -> int:
    """The exit code of a run that failed; says on stderr which processes were killed, when none failed on its own.

    Args:
        codes: rank → exit code, or minus the signal that killed it.
        told: the signal that was passed on to them, if any.
    """
    code, killed, _ = judge(codes, told)
    if killed:
        say(f"guard: killed: {killed}; the same command continues from what is saved.")
    return code


def judge(codes: Mapping[int, int], told: int | None) -> tuple[int, str, bool]:
    """The exit code of a failure, which ranks were killed, for people, and whether all that happened was elsewhere."""
    stopped, followed = Preempted.exit_code, {LOST_ANOTHER, *(-number for number in SIGNALS)}
    if set(codes.values()) <= {stopped, *followed} and (told is not None or stopped in codes.values()):
        return stopped, "", False
    own = [code for _, code in sorted(codes.items()) if code > 0 and code not in (stopped, LOST_ANOTHER)]
    if own:
        # It has said why itself. The agent kills what then waits for it inside a collective.
        return own[0], "", False
    # The agent ends by SIGTERM what is left when one has failed.
    by_others = {rank: -code for rank, code in sorted(codes.items()) if code < 0 and -code != signal.SIGTERM}
    killed = [f"rank {rank} by signal {number}" for rank, number in by_others.items()]
    if killed:
        return 1, ", ".join(killed), False
    lost = LOST_ANOTHER in codes.values()
    return LOST_ANOTHER if lost else 1, "", lost


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launchers.torchrun", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nnodes", type=int, default=1, metavar="K", help="machines; the same command runs on each")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where they meet: one of them, and a free port")
    parser.add_argument("--local-addr", metavar="HOST", help="what the others call this machine (default: its name)")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=RESTARTS,
        metavar="R",
        help=f"how often all start again when one was killed or another machine is gone (default: {RESTARTS})",
    )
    parser.add_argument("--rdzv-id", metavar="NAME", help="tells runs apart that meet at one place (default: guard)")
    parser.add_argument(
        "processes",
        type=int,
        metavar="N",
        help="number of processes on each machine; one for each GPU where there are some",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a guard command and its options")
    given = parser.parse_args()
    if given.processes < 1 or not given.command:
        parser.error("needs at least one process and a guard command, for instance: 2 run experiment=demo")
    if (given.nnodes > 1) != bool(given.rdzv_endpoint):
        parser.error("--nnodes=2 or more and --rdzv-endpoint=HOST:PORT go together")
    if (given.rdzv_id or given.local_addr) and given.nnodes == 1:
        parser.error("--rdzv-id and --local-addr belong to --nnodes=2 or more")
    if given.max_restarts < 0:
        parser.error("--max-restarts counts from 0")
    return given


if __name__ == "__main__":
    sys.exit(main())
