"""The processes of a run: one, or those that torchrun or Slurm started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from distill.environment import detect
from distill.errors import ConfigError
from distill.provenance import processor
from distill.training.meeting import Lifeline, open_store

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: 0 … world_size − 1.
        world_size: number of processes.
        device: where this process computes.
        control: a gloo group for what ranks tell each other on the CPU; None: the group of the run.
    """

    rank: int
    world_size: int
    device: torch.device
    control: distributed.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0

    @property
    def hardware(self) -> str:
        """What this process computes on, for people: the GPU or the CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()

    def share(self, count: int) -> range:
        """The positions among ``count`` independent pieces of work that are this rank's."""
        return range(self.rank, count, self.world_size)

    def barrier(self) -> None:
        """Wait for the other ranks, without keeping a GPU busy."""
        if self.world_size > 1:
            distributed.barrier(group=self.control)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def agree(self, *flags: bool) -> Callable[[], list[bool]]:
        """Begin to ask which flags are set on some rank; calling what is returned waits for the answer.

        The answer travels while a step is computed, and costs a GPU no synchronisation.
        """
        if self.world_size == 1:
            return lambda: list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        work = distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> list[bool]:
            assert work is not None
            work.wait()
            return [bool(value) for value in values.tolist()]

        return answer

    def gather(self, values: list[float]) -> Tensor:
        """float64 (world_size, len(values)): the numbers of every rank, on every rank."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.world_size == 1:
            return own[None]
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        distributed.all_gather(rows, own, group=self.control)
        return torch.stack(rows)

    def tell(self, value: T) -> T:
        """What rank 0 says, on every rank."""
        if self.world_size == 1:
            return value
        said = [value]
        distributed.broadcast_object_list(said, src=0, group=self.control)
        return said[0]


@contextlib.contextmanager
def processes(device: str = "auto", threads: int = 0) -> Iterator[Processes]:
    """Join the process group that the environment describes; without one this is the only process.

    Args:
        device: auto, cpu or cuda.
        threads: CPU threads of this process; 0 leaves it to torch.

    Raises:
        ConfigError: when the environment contradicts itself, or there is no GPU for this rank.
    """
    who = detect()
    rank, world_size, local_rank = who.rank, who.world_size, 0 if who.own_gpu else who.local_rank
    if threads:
        torch.set_num_threads(threads)
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and local_rank >= gpus:
        raise ConfigError(f"device=cuda, and rank {rank} finds {gpus} GPUs; start fewer processes or use device=cpu.")
    if device == "auto" and 0 < gpus <= local_rank:
        raise ConfigError(f"Rank {rank} has no GPU, for there are {gpus}; start {gpus} processes or use device=cpu.")
    chosen = torch.device("cuda", local_rank) if local_rank < gpus else torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    control: distributed.ProcessGroup | None = None
    if world_size > 1:
        # Ranks wait for each other's share of a stage, and for the data set: that takes as long as it takes. When a
        # process dies, its connections close; when a machine is gone without a word, the lifeline ends the wait.
        backend, timeout = "nccl" if chosen.type == "cuda" else "gloo", timedelta(days=14)
        store = open_store(who, timeout)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        group = distributed.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, distributed.ProcessGroup)
        control = group
    found = Processes(rank, world_size, chosen, control)
    try:
        with Lifeline(rank, world_size, who.master_address or "", found.tell) if control else contextlib.nullcontext():
            yield found
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on a GPU inside the block; the CPU's are."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
