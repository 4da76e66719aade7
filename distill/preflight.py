"""What would stop a later stage, found before any work."""

from __future__ import annotations

import math
from pathlib import Path

from distill.config import Config
from distill.environment import detect
from distill.errors import ConfigError
from distill.graph import stored_layout


def preflight(config: Config, command: str) -> None:
    """Find what would stop a later stage, before any work."""
    from distill.data.loaders import check_installed
    from distill.regularizers import Surroundings, build_regularizer
    from distill.stages.evaluate import planned_outcomes

    surroundings = Surroundings(
        config.dataset.mean, config.dataset.std, config.squeeze.batch_size, config.dataset.image_size
    )
    build_regularizer(config.regularizer, surroundings)
    if command in ("run", "squeeze", "evaluate"):
        check_installed(config)
        stored_layout(config)
    if command in ("run", "evaluate"):
        planned_outcomes(config)
    if command in ("run", "squeeze"):
        check_batches(config, detect().world_size)


def check_place(config: Config) -> None:
    """Raises ConfigError where a new run would lie inside another one, or around some: reports would not see them."""
    folder = Path(config.run_root) / config.name
    if (folder / "config.yaml").is_file():
        return
    for above in folder.parents[: len(Path(config.name).parts) - 1]:
        if not (above / "config.yaml").is_file():
            continue
        if config.controls:
            raise ConfigError(
                f"{above} is a run of its own, made without controls; choose another name=… for it with its controls "
                f"(arm=main squeeze.reuse={above} takes over its teacher)."
            )
        raise ConfigError(f"{above} is a run, inside which reports see no other; choose another name=….")
    for inside in [*folder.glob("*/config.yaml"), *folder.glob("*/*/config.yaml")]:
        if inside.relative_to(folder).parts[0] != "launch":
            raise ConfigError(
                f"{folder} holds the run {inside.parent}, which reports would not see inside another one; choose "
                f"another name=…, or the experiment that it is an arm of."
            )


def check_batches(config: Config, world_size: int) -> None:
    """One global batch is divided over ranks and micro-batches, whatever the engine."""
    from distill.training.engine import check_engine

    size, per_rank = config.squeeze.batch_size, world_size * config.squeeze.accumulation
    if size % per_rank:
        low = size // per_rank * per_rank
        fitting = " and ".join(str(size) for size in (low, low + per_rank) if size)
        raise ConfigError(
            f"squeeze.batch_size={size} does not divide over {world_size} ranks and "
            f"{config.squeeze.accumulation} micro-batches; {fitting} do."
        )
    images = size // per_rank
    if config.regularizer.fraction * images < 1:
        raise ConfigError(
            f"regularizer.fraction={config.regularizer.fraction:g} takes no image of the {images} that a rank sees at "
            f"once; use at least {math.ceil(1e4 / images) / 1e4:g}."
        )
    check_engine(config, world_size)
