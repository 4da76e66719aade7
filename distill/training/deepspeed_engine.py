"""DeepSpeed: ZeRO 0, 1 and 2 over the same step as plain PyTorch. The only file that imports deepspeed."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from distill.config import EngineConfig
from distill.errors import ConfigError
from distill.training.base_engine import BaseEngine
from distill.training.deepspeed_settings import check_installed, settings
from distill.training.processes import Processes

BUCKET = 50_000_000
"""At most this many gradients travel together; DeepSpeed's 500 million reserve 2 GB."""


class DeepSpeedEngine(BaseEngine):
    """See ``Engine``. ZeRO shares out the optimiser's state (1) and the gradients too (2) over the ranks.

    The wrapped task stays inside: DeepSpeed hooks every backward pass through its output, so a penalty's inner
    gradients must be taken within the one forward pass.
    """

    def __init__(self, config: EngineConfig, processes: Processes):
        super().__init__(processes)
        self.config = config

    def _wrap(self) -> None:
        self._groups: list[list[nn.Parameter]] = [list(group["params"]) for group in self.optimizer.param_groups]
        count = sum(parameter.numel() for group in self._groups for parameter in group)
        # DeepSpeed wants a size and uses it for its throughput meter alone.
        smallest = self.processes.world_size * self.accumulation
        told = settings(self.config, self.batch_size or smallest, self.accumulation, self.processes.world_size)
        told["zero_optimization"].setdefault("reduce_bucket_size", min(count, BUCKET))
        formats = _make_contiguous(self.task)
        with _quiet(), _environment(self.processes.device):
            deepspeed = _import_deepspeed(self.processes.device)
            _join(deepspeed, self.processes)
            self._wrapped = deepspeed.initialize(model=self.task, optimizer=self.optimizer, config=told)[0]
        level = logging.INFO if told["wall_clock_breakdown"] or told["steps_per_print"] else logging.WARNING
        logging.getLogger("DeepSpeed").setLevel(level)
        self._zero = self._wrapped.optimizer if self.config.zero_stage else None
        if self._zero is None:
            for parameter, memory_format in formats.items():
                parameter.data = parameter.data.contiguous(memory_format=memory_format)

    def _clear_gradients(self) -> None:
        self._wrapped.zero_grad()

    def _forward_backward(self, part: Any, weight: float, *, last: bool) -> dict[str, Tensor]:
        self._wrapped.set_gradient_accumulation_boundary(last)
        terms: dict[str, Tensor] = self._wrapped(part)
        # The weight holds the share of the micro-batch already.
        self._wrapped.backward(terms["loss"] * weight, scale_wrt_gas=False)
        return terms

    def _gradient_norm(self) -> Tensor:
        if self._zero is None:
            gradients = [parameter.grad for group in self._groups for parameter in group if parameter.grad is not None]
            return nn.utils.get_total_norm(gradients)
        zero = self._zero
        groups = [
            zero.get_grad_norm_direct(zero.averaged_gradients[number], zero.params_in_partition[number])
            for number in range(len(self._groups))
        ]
        norms = torch.stack([torch.as_tensor(norm, device=self.processes.device) for norm in groups])
        # DeepSpeed writes -1 for a norm that is not finite; its own norm over groups may take that for a length of 1.
        return torch.where((norms < 0).any(), torch.nan, torch.linalg.vector_norm(norms))

    def _update(self) -> None:
        self._wrapped.step()

    def _optimizer_state(self) -> dict[str, Any]:
        if self._zero is None:
            return self.optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for number, (options, parameters) in enumerate(zip(self.optimizer.param_groups, self._groups, strict=True)):
            first = sum(len(group["params"]) for group in groups)
            groups.append({**options, "params": list(range(first, first + len(parameters)))})
            flat, partition = self._zero.bit16_groups_flat[number], self._zero.single_partition_of_fp32_groups[number]
            for key, value in self.optimizer.state.get(partition, {}).items():
                whole = _gather(value, flat) if isinstance(value, Tensor) and value.dim() else None
                for index, parameter in enumerate(parameters, start=first):
                    state.setdefault(index, {})[key] = value if whole is None else _place(parameter, flat, whole)
        return {"state": state, "param_groups": groups}

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        if self._zero is None:
            self.optimizer.load_state_dict(state)
            return
        # The parameters were loaded into DeepSpeed's working copies; what it steps on are its float32 partitions.
        self._zero.refresh_fp32_params()
        for number, (options, saved) in enumerate(zip(self.optimizer.param_groups, state["param_groups"], strict=True)):
            options.update({key: value for key, value in saved.items() if key != "params"})
            flat, partition = self._zero.bit16_groups_flat[number], self._zero.single_partition_of_fp32_groups[number]
            entries = [
                (p, state["state"].get(i, {})) for p, i in zip(self._groups[number], saved["params"], strict=True)
            ]
            self.optimizer.state[partition] = {}
            for key, example in {key: value for _, entry in entries for key, value in entry.items()}.items():
                if not isinstance(example, Tensor) or not example.dim():
                    self.optimizer.state[partition][key] = example
                    continue
                whole = torch.zeros_like(flat, dtype=example.dtype)
                for parameter, entry in entries:
                    if key in entry:
                        _place(parameter, flat, whole).copy_(entry[key])
                own = whole.narrow(0, self.processes.rank * partition.numel(), partition.numel())
                self.optimizer.state[partition][key] = own.clone()


def build(config: EngineConfig, processes: Processes) -> DeepSpeedEngine:
    """The engine of ``engine=deepspeed_zero0`` … ``deepspeed_zero2``."""
    check_installed()
    return DeepSpeedEngine(config, processes)


def _gather(partition: Tensor, flat: Tensor) -> Tensor:
    """Equal partitions of all ranks, in a row: as ``flat`` lies."""
    whole = torch.empty_like(flat, dtype=partition.dtype)
    distributed.all_gather_into_tensor(whole, partition.contiguous())
    return whole


def _place(parameter: nn.Parameter, flat: Tensor, whole: Tensor) -> Tensor:
    """The part of ``whole`` that belongs to a parameter, which itself is a view into ``flat``."""
    offset = parameter.data.storage_offset() - flat.storage_offset()
    return whole.narrow(0, offset, parameter.numel()).view(parameter.shape)


def _make_contiguous(task: nn.Module) -> dict[nn.Parameter, torch.memory_format]:
    """DeepSpeed broadcasts and flattens parameters as bytes in a row; returns the memory formats they had."""
    formats = {}
    for parameter in task.parameters():
        if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
            formats[parameter] = torch.channels_last
        # A 1x1 convolution counts as contiguous whatever its strides are: flattening gives it those of the shape.
        parameter.data = parameter.data.flatten().view(parameter.shape)
    return formats


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's advice about a setting that is chosen on purpose does not reach the terminal."""
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _environment(device: torch.device) -> Iterator[None]:
    """The variables that DeepSpeed reads; those that it leaves behind are taken back."""
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = device.type
    # It takes this for the number of the GPU.
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _import_deepspeed(device: torch.device) -> Any:
    """The package, computing where this run does.

    Raises:
        ConfigError: when this process has used it on another kind of device.
    """
    import deepspeed

    chosen = deepspeed.get_accelerator().device_name()
    if chosen != device.type:
        raise ConfigError(f"DeepSpeed already runs on {chosen} in this process; start another one for {device.type}.")
    # A C++ operator of its inference collectives: compiling it at first use would need g++ on every machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls in every step what torch 2.14 has renamed.
    renamed, where = r"`torch\.distributed\.\w+_tensor` is deprecated", r"torch\.distributed\."
    warnings.filterwarnings("ignore", renamed, FutureWarning, where)
    return deepspeed


def _join(deepspeed: Any, processes: Processes) -> None:
    """Make DeepSpeed use the process group of this run; a single process gets a group of its own."""
    if not distributed.is_initialized():
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    global _joined
    if _joined is not distributed.group.WORLD:
        # What DeepSpeed remembers of a process group that has ended.
        deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None
        _joined = distributed.group.WORLD


_joined: Any = None
"""The process group that DeepSpeed was set up with."""
