"""Controls: runs that an experiment is compared with, added to its arms by one switch (``controls=all``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from omegaconf import OmegaConf

from distill.compose import compose, group_choices, names_of
from distill.config import Config, RegularizerConfig, result_options
from distill.errors import ConfigError
from distill.graph import STAGES, stored_layout

TEACHER = next(stage for stage in STAGES if stage.makes == "teacher")


def control_config(config: Config, name: str, overrides: Sequence[str], folder: str | Path | None) -> Config:
    """The configuration of one control.

    Args:
        config: of the experiment, with the control among ``config.controls``.
        overrides: of the command line. Those of what the control sets itself are left out: it would not be that control
            any more. So are regulariser options, which are those of its regulariser's own file.
        folder: with config groups of the user's own.

    Raises:
        ConfigError: the control and the other options do not go together.
    """
    own: list[str] = config.controls[name]
    fixed = {text.split("=", 1)[0] for text in own}
    kept = [text for text in overrides if not fixed & names_of(text)]
    try:
        mine = compose([*kept, *_as_its_file_says(own, folder), *own], folder)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    mine.name = f"{config.name}/{name}"
    mine.squeeze.reuse = ""
    mine.published = {}
    return mine


def _as_its_file_says(own: Sequence[str], folder: str | Path | None) -> list[str]:
    """Every option of the control's regulariser, so that nothing is left of what the experiment sets for its arms."""
    choices = group_choices(folder)["regularizer"]
    chosen = next((text.split("=", 1)[1] for text in own if text.startswith("regularizer=")), None)
    if chosen not in choices:
        return []
    given, texts = dict(OmegaConf.load(choices[chosen])), []
    for each in fields(RegularizerConfig):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        value = given.get(each.name, default)
        if each.name not in ("name", "options"):
            texts.append(f"regularizer.{each.name}={'null' if value is None else value}")
    return texts


def share_teachers(configs: Sequence[Config]) -> list[str]:
    """Let a control take the teacher of a run before it that trains the same one (``squeeze.reuse``).

    Args:
        configs: in the order in which they run; those of controls are changed.

    Returns:
        One sentence for each control that does so.
    """
    told = []
    for place, config in enumerate(configs):
        if config.name.rpartition("/")[2] not in config.controls:
            continue
        alike = next((each for each in configs[:place] if _teacher(each) == _teacher(config)), None)
        if alike is not None:
            config.squeeze.reuse = str(Path(alike.run_root) / alike.name)
            told.append(f"{config.name} takes the teacher of {alike.name}, which is trained alike.")
    return told


def _teacher(config: Config) -> dict[str, object]:
    places = {"name": config.dataset.name, "root": config.data_root, "weights": config.squeeze.weights}
    return {**result_options(config, *TEACHER.options(config)), **stored_layout(config), **places}
