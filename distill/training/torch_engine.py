"""Plain PyTorch: one process, or DistributedDataParallel under torchrun."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distill.config import EngineConfig
from distill.files import write_atomic
from distill.training.engine import Task, check_finite
from distill.training.processes import Processes

STATE = "state.pt"


class TorchEngine:
    """See ``Engine``. Over ranks gradients are averaged by DDP, and running statistics after every step."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.step_count = 0

    def prepare(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        accumulation: int = 1,
        ema: float = 0.0,
    ) -> None:
        self.task, self.optimizer, self.schedule, self.accumulation = task, optimizer, schedule, accumulation
        self.average: AveragedModel | None = None
        if ema:
            self.average = AveragedModel(task.network, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
        self.parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
        layers = [module for module in task.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
        self.statistics = [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
        self.wrapped: nn.Module = task
        if self.processes.world_size > 1:
            gpu = [self.processes.device] if self.processes.device.type == "cuda" else None
            # Running statistics are averaged below: broadcasting those of rank 0 would drop the other ranks' batches.
            self.wrapped = DistributedDataParallel(task, device_ids=gpu, broadcast_buffers=False)

    def step(self, batch: Any) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.split(self.accumulation) if self.accumulation > 1 else [batch]
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with self._synchronised(last=number == len(parts)):
                terms = self.wrapped(part)
                share = len(part) / len(batch)
                (terms["loss"] * (share * batch.weight)).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() * share
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        sums["parameter_gradient"] = nn.utils.get_total_norm(gradients)
        check_finite(sums, self.step_count)
        self.optimizer.step()
        self.schedule.step()
        self._average_statistics(batch.weight)
        if self.average is not None:
            self.average.update_parameters(self.task.network)
        self.step_count += 1
        return sums

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over ranks once, in the last micro-batch."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def _average_statistics(self, weight: float) -> None:
        if self.processes.world_size > 1 and self.statistics:
            flat = self.processes.sum(torch.cat(self.statistics) * weight) / self.processes.world_size
            for buffer, mean in zip(self.statistics, flat.split([len(b) for b in self.statistics]), strict=True):
                buffer.copy_(mean)

    def _parts(self) -> dict[str, Any]:
        parts = {"task": self.task, "optimizer": self.optimizer, "schedule": self.schedule, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self, folder: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        buffer = io.BytesIO()
        torch.save({**state, "step_count": self.step_count}, buffer)
        write_atomic(folder / STATE, buffer.getvalue())

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.processes.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step_count = state["step_count"]

    def trained_network(self) -> nn.Module:
        return self.task.network if self.average is None else self.average.module


def build(config: EngineConfig, processes: Processes) -> TorchEngine:
    """The engine of ``engine=torch``."""
    return TorchEngine(processes)
