"""What runs inside a job: one command on one process, answered to whoever has started it.

Exit codes are those of ``guard``, and 77 when a job has been stopped too often. The shell around a Slurm job
(``launchers/slurm.py``) tries again what ends with another code than 0, 2 and 77.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from submitit.core.utils import DelayedSubmission, UncompletedJobError
from submitit.helpers import TorchDistributedEnvironment

from distill.config import Config
from distill.environment import detect
from distill.errors import Preempted
from distill.say import say
from launchers.graph import PREPARE, REPORT
from launchers.snapshot import check_code

STOPPED_TOO_OFTEN = 77
PATIENCE = 900.0
"""Seconds that a job waits for a process that still trains in its run: one of a node that Slurm has lost sight of."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class StageJob:
    """A stage as submitit runs it, in each process of a job.

    Attributes:
        stage: ``prepare``, the command of a stage, or ``report``.
        configs: one run, or all of them for the report.
        command: the words of the command line that does the same by hand, for the provenance.
        place: the working directory, from which relative paths count.
        code: the copy of the packages that must be the one at work.
        joined: the processes of the job are ranks of one group; else each is a worker of its own.
        requeues: so often the job may be stopped and requeued.
        stops: how often it has been.
    """

    stage: str
    configs: tuple[Config, ...]
    command: Sequence[str]
    place: Path
    code: Path
    joined: bool
    requeues: int
    stops: int = 0

    def __call__(self) -> None:
        """Do the work; leaves by SystemExit unless it is done."""
        os.chdir(self.place)
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        if self.joined:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        sys.argv[:] = [*self.command]
        from distill.told import told

        ended = told(self._work)
        if ended.code == Preempted.exit_code and ended.signal != signal.SIGTERM:
            self._hand_on()
        if ended.code:
            sys.exit(ended.code)

    def checkpoint(self) -> DelayedSubmission | None:
        """For submitit: the arguments of the next start; None when it has been stopped too often.

        It runs on rank 0 alone, after all ranks have saved.
        """
        return None if self.stops >= self.requeues else DelayedSubmission(replace(self, stops=self.stops + 1))

    def _work(self) -> int:
        check_code(self.code)
        if self.stage == PREPARE:
            from data_prep import prepare

            print(prepare(self.configs[0]).describe())
        elif self.stage == REPORT:
            self._report()
        else:
            from distill import pipeline

            # One of an array stays until all is made: what waits for the array relies on it, and another may yet die.
            stay = os.environ.get("SLURM_ARRAY_TASK_ID", "0") == "0"
            pipeline.run(self.configs, self.stage, patience=PATIENCE, stay=stay)
        return 0

    def _report(self) -> None:
        from distill import report
        from distill.pipeline import experiment_folder, run_folder

        runs = [run_folder(config) for config in self.configs]
        report.write(experiment_folder(self.configs[0]), runs)
        print(report.compare(runs, "markdown"))

    def _hand_on(self) -> None:
        """Let submitit's own handler requeue the job: everything is saved, and its handler is in place again."""
        if detect().rank:
            # Leaving with a failure would make srun end rank 0 before it has asked Slurm to requeue the job.
            sys.exit(0)
        try:
            signal.raise_signal(getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"))
        except UncompletedJobError:
            say(
                f"guard: {self.stage} has been stopped {self.stops + 1} times, and cluster.requeues={self.requeues}; "
                f"what is done is kept, and another guard launch goes on with it."
            )
            sys.exit(STOPPED_TOO_OFTEN)
        except subprocess.SubprocessError as error:
            say(f"guard: the job could not be requeued: {error}")
        except SystemExit as left:
            if left.code != -1:
                raise
