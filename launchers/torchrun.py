"""``python -m launchers.torchrun N run key=value …``: a ``guard`` command in N processes on this machine.

The same as ``torchrun --standalone --nproc_per_node=N -m distill run key=value …``, except that the CPU cores are
divided among the processes; torchrun gives each of them one thread.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def arguments(processes: int, command: Sequence[str]) -> list[str]:
    """The command line of torchrun, interpreter first."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, "-m", "distill", *command]


def threads(processes: int, cores: int) -> int:
    """CPU threads of each process."""
    return max(1, cores // processes)


def main() -> None:
    """Replace this process by torchrun, so that signals and the exit code are its own."""
    parser = argparse.ArgumentParser(prog="python -m launchers.torchrun", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "processes", type=int, metavar="N", help="number of processes; one for each GPU where there are some"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a guard command and its options")
    given = parser.parse_args()
    if given.processes < 1 or not given.command:
        parser.error("needs at least one process and a guard command, for instance: 2 run experiment=demo")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(given.processes, len(os.sched_getaffinity(0)))))
    line = arguments(given.processes, given.command)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
