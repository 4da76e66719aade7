"""The runs that a command line asks for: one for each arm and control of an experiment, or just the one."""

from __future__ import annotations

from collections.abc import Sequence

from distill.compose import compose, names_of, options
from distill.config import Config
from distill.errors import ConfigError
from distill.limits import check_given

MAIN_ARM = "main"
"""What an experiment without arms becomes when it has controls."""


def configurations(overrides: Sequence[str], folder: str | None) -> list[Config]:
    """The configurations that a command line asks for: one for each arm of an experiment, or just the one.

    Raises:
        ConfigError: an override is wrong, or counts in none of the runs.
    """
    given = {text.split("=", 1)[0].lstrip("+~") for text in overrides}
    # Other options may fit one arm only, so that they wait until the arms are known.
    first = {"experiment", "name", "arm", "controls", "teacher", "student"}
    config = compose([text for text in overrides if names_of(text) & first], folder)
    if not config.arms:
        config = compose(overrides, folder)
        if config.controls:
            config.arms = {MAIN_ARM: []}
    known = [*config.arms, *config.controls]
    if config.arm and config.arm not in known:
        raise ConfigError(f"arm={config.arm} is not one of: {', '.join(known) or 'none, for there are no arms'}.")
    if _departs(given):
        config.published = {}
    configs = []
    for arm in [config.arm] if config.arm else known:
        if arm in config.controls:
            from distill.controls import control_config

            configs.append(control_config(config, arm, overrides, folder))
            continue
        own = [text for text in config.arms[arm] if not given & names_of(text)]
        mine = compose([*own, *overrides], folder)
        mine.name = f"{config.name}/{arm}"
        mine.published = {arm: config.published[arm]} if arm in config.published else {}
        configs.append(mine)
    configs = configs or [config]
    check_given(configs, given)
    return configs


def _departs(given: set[str]) -> bool:
    """Whether overrides change more than seeds, places and speed: then published accuracies do not stand beside."""
    harmless = {key for key, _, field in options() if not field.metadata["result"]}
    # No part of a fingerprint themselves: a name of further options, and paths of which the content counts.
    harmless -= {"method", "squeeze.weights", "recover.images", "recover.teachers"}
    return bool(given - harmless - {"experiment", "engine", "loader", "cluster", "seed", "evaluate.seeds"})
