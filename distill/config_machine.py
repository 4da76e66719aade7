"""The part of the schema that says on what a run computes and what it reads and writes meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from distill.option import option


@dataclass
class EngineConfig:
    """What runs the optimiser steps of squeeze."""

    name: str = option(
        "torch",
        "torch: one process, or DDP under torchrun; deepspeed: ZeRO",
        choices=("torch", "deepspeed"),
        result=False,
    )
    zero_stage: int | None = option(
        None,
        "of engine.name=deepspeed: ranks share out nothing (0), the optimiser's state (1), gradients too (2)",
        low=0,
        result=False,
    )
    deepspeed_config: str = option(
        "", "path of a DeepSpeed JSON file with further settings of engine.name=deepspeed", result=False
    )

    @property
    def choice(self) -> str:
        """What ``engine=`` calls it: torch, deepspeed_zero1, …"""
        return self.name if self.zero_stage is None else f"{self.name}_zero{self.zero_stage}"


@dataclass
class FormatConfig:
    """How prepared images lie on disk. Every option but the name belongs to format=ffcv."""

    name: str = option("folder", "folder: the image files as they are; ffcv: .beton files for loader=ffcv")
    mode: str | None = option(
        None,
        "records are pixels, JPEG, or JPEG for a share of them; auto: raw up to 256 pixels, above that proportion",
        choices=("auto", "raw", "jpg", "proportion"),
    )
    jpeg_share: float | None = option(None, "share of JPEG records of mode=proportion; 0.1 when unset", low=0, high=1)
    quality: int | None = option(None, "quality of JPEG records; 90 when unset", low=1, high=100)
    side: str | None = option(
        None, "side of an image that resolution limits; longest when unset", choices=("longest", "shortest")
    )
    resolution: int | None = option(
        None,
        "larger images are made smaller; image_size · 400/224 when unset (400 at 224, as in ffcv-imagenet)",
        unit="pixels",
        low=8,
    )


@dataclass
class LoaderConfig:
    """What reads the real images. ``order`` and ``cache`` belong to the loaders whose YAML files set them."""

    name: str = option("folder", "module distill/data/NAME_loader.py")
    workers: int = option(2, "processes (folder) or threads (ffcv, dali) that read on each rank", low=0, result=False)
    drop_last: bool = option(True, "leave out the last training batch of an epoch when it is not full")
    order: str | None = option(
        None,
        "random: any permutation; quasi_random: few pages of the file are open at a time",
        choices=("random", "quasi_random"),
    )
    cache: str | None = option(
        None,
        "page: memory-mapped through the operating system's page cache; process: each process reads and keeps pages",
        choices=("page", "process"),
        result=False,
    )
    resolution: str = option(
        "constant",
        "training images have dataset.image_size, or rise from sizes[0] to sizes[1]; tests always have image_size",
        choices=("constant", "rising"),
    )
    sizes: list[int] | None = option(None, "first and last side of resolution=rising", unit="pixels", length=2, low=8)
    ramp: list[float] | None = option(
        None,
        "shares of the epochs between which resolution=rising rises; [0.74, 0.86] when unset",
        length=2,
        low=0,
        high=1,
    )
    size_step: int | None = option(
        None, "sides of resolution=rising are multiples of this; 32 when unset", unit="pixels", low=1
    )


@dataclass
class MonitorConfig:
    """What is written while a stage works."""

    tensorboard: bool = option(True, "write TensorBoard events", result=False)
    every: int = option(20, "optimiser steps between two lines of metrics", low=1, result=False)
    checkpoint_minutes: float = option(
        5.0,
        "time between two checkpoints of a training; the end of an epoch is kept too, after a tenth of that time",
        unit="minutes",
        low=0,
        result=False,
    )
    keep_checkpoints: int = option(
        2,
        "checkpoints that stay: when the newest is damaged, training goes on from the one before",
        low=1,
        result=False,
    )


@dataclass
class SharingConfig:
    """Work on one run by any number of processes, on any machines that see its folder."""

    lease: float = option(
        120.0,
        "a worker of another machine that has not been heard of for so long is taken for dead, and its unit made anew",
        unit="seconds",
        low=10,
        result=False,
    )
