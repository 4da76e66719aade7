"""A job of several ranks that adds up over them, is preempted, and adds up again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission


class AllReduce:
    """Writes the sum of 1 … ranks to ``folder/attempt-rank``; the first attempt then waits to be preempted."""

    def __call__(self, folder: Path, attempt: int) -> None:
        """One rank's work."""
        import torch
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        number = torch.tensor(rank + 1)
        torch.distributed.all_reduce(number)
        torch.distributed.destroy_process_group()
        (folder / f"{attempt}-{rank}").write_text(str(number.item()))
        while attempt == 0:
            time.sleep(0.1)

    def checkpoint(self, folder: Path, attempt: int) -> Any:
        """The arguments after a preemption; called by submitit on rank 0."""
        return DelayedSubmission(self, folder, attempt + 1)
