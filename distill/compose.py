"""From YAML groups and ``key=value`` overrides to a checked ``Config`` (Hydra's Compose API)."""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.config import Config
from distill.errors import ConfigError
from distill.limits import check


def config_folder() -> Path:
    """The shipped ``configs/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"The configuration files are missing beside {package}; install guard-distill again.")


def compose(overrides: Sequence[str] = (), extra_folder: str | Path | None = None) -> Config:
    """Compose and check a configuration.

    Args:
        overrides: ``group=choice`` and ``key=value`` strings, as on the command line.
        extra_folder: a folder with groups of your own (``regularizer/mine.yaml``), searched after the shipped ones.

    Raises:
        ConfigError: one sentence with the full key and what is allowed.
    """
    overrides = _literal(overrides)
    groups = group_choices(extra_folder)
    _check_overrides(overrides, groups)
    if extra_folder is not None:
        if not Path(extra_folder).is_dir():
            raise ConfigError(f"The folder of --config-dir does not exist: {extra_folder}")
        folder = str(Path(extra_folder).resolve()).replace("\\", "\\\\").replace("'", "\\'")
        overrides.append(f"hydra.searchpath=['file://{folder}']")
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            node = hydra_compose(config_name="config", overrides=overrides, return_hydra_config=True)
        chosen = node.hydra.runtime.choices
        with open_dict(node):
            del node.hydra
        config = OmegaConf.to_object(node)
        assert isinstance(config, Config)
        check(config)
        _check_groups(config, groups, chosen)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_one_sentence(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"A YAML file of --config-dir {extra_folder} is no UTF-8: {error}.") from error
    # No method of ours has made images that are ready, nor those that are never optimised.
    if config.recover.images:
        config.method = "ready images"
    elif not config.recover.iterations:
        config.method = "real images"
    return config


def group_choices(extra_folder: str | Path | None = None) -> dict[str, dict[str, Path]]:
    """Every config group and its choices: {"regularizer": {"curvature": file, …}, …}."""
    found: dict[str, dict[str, Path]] = {}
    for root in [config_folder(), *([Path(extra_folder)] if extra_folder else [])]:
        for file in sorted(root.glob("*/*.yaml")):
            found.setdefault(file.parent.name, {}).setdefault(file.stem, file)
    return found


def options(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every option as (full key, type, dataclass field), in the order of the schema."""
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            yield from options(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name], f


def names_of(override: str) -> set[str]:
    """The key that an override sets and the groups above it: a group that is given replaces an arm's options."""
    key = override.split("=", 1)[0].lstrip("+~")
    return {key} | {key[:end] for end, character in enumerate(key) if character == "."}


def _literal(overrides: Sequence[str]) -> list[str]:
    """Text is taken as it stands: Hydra's grammar makes the number 20260105 of 2026_01_05, and reads no é, ~ or (."""
    types, texts = {key: hint for key, hint, _ in options()}, []
    for text in overrides:
        key, _, value = (part.strip() for part in text.partition("="))
        if types.get(key) is str and value and not re.search("['\"]", value):
            try:
                parsed = OverridesParser.create().parse_override(text)
                changed = parsed.is_sweep_override() or isinstance(parsed.value(), bool | int | float)
            except HydraException:
                changed = True
            if changed:
                # No shell expands ~ behind a key with a dot.
                value = os.path.expanduser(value)
                text = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
        texts.append(text)
    return texts


def _check_overrides(overrides: Sequence[str], groups: dict[str, dict[str, Path]]) -> None:
    types = {key: hint for key, hint, _ in options()}
    for text in overrides:
        try:
            parsed: Override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            if "=" in text:
                raise ConfigError(f"The value of {text!r} cannot be read; a list stands in brackets: [1,2].") from error
            raise ConfigError(f"{text!r} is not of the form key=value.") from error
        key = parsed.key_or_group
        if key in groups:
            choice = parsed.value()
            chosen = choice if key == "controls" and isinstance(choice, list) else [choice]
            if parsed.is_delete() or not all(isinstance(each, str) and each in groups[key] for each in chosen):
                raise ConfigError(f"{text} is not one of: {', '.join(groups[key])}.")
        elif key not in types and not _inside_open_mapping(key, types):
            close = difflib.get_close_matches(key, [*types, *groups], n=1, cutoff=0.5)
            close = [name for name in types if name.split(".")[-1] == key] or close
            hint = f"did you mean {' or '.join(close)}?" if close else "guard config shows every key."
            raise ConfigError(f"Unknown key {key}; {hint}")
        elif parsed.is_sweep_override():
            value = text.split("=", 1)[1]
            raise ConfigError(f"{text} is more than one value; a list stands in brackets: '{key}=[{value}]'.")


def _inside_open_mapping(key: str, types: dict[str, Any]) -> bool:
    parents = [key[: match.start()] for match in re.finditer(r"\.", key)]
    return any(typing.get_origin(types.get(parent)) is dict for parent in parents)


def _one_sentence(error: Exception) -> str:
    """The key and the cause out of the many lines of a Hydra or OmegaConf error."""
    if mark := getattr(error, "problem_mark", None):
        return f"{mark.name}, line {mark.line + 1}, is no YAML: {getattr(error, 'problem', '')}."
    file = re.match(r"In '[^']+': ", str(error))
    while not (key := getattr(error, "full_key", None)):
        inner = error.__cause__ or error.__context__
        if not isinstance(inner, OmegaConfBaseException | HydraException):
            break
        error = inner
    if key and "is not in struct" in str(error):
        return f"{key} does not exist; write +{key}=… to add it."
    if file and "Key 'experiment' not in 'Config'" in str(error):
        return f"{file.group()}an experiment begins with the line # @package _global_, and this file does not."
    if key and "is not a ListConfig" in str(error):
        return f"{key} is a list and stands in brackets: {key}=[…]."
    cause = re.sub(r"\s+", " ", str(error).split("\n")[0]).rstrip(".")
    place = file.group() if file and not cause.startswith(file.group()) else ""
    named = f"{key}: " if key and str(key) not in cause else ""
    return f"{place}{named}{cause}."


CHECKED_TOGETHER = {"options", "sizes", "ramp", "size_step", "jpeg_share", "quality", "side", "resolution"}
"""Options without a value that are not bound to a YAML file: whether they fit is checked with other options."""


def _check_groups(config: Config, groups: Mapping[str, Mapping[str, Path]], chosen: Mapping[str, str]) -> None:
    for group, choice in chosen.items():
        file = groups.get(group, {}).get(choice)
        if file and hasattr(getattr(config, group, None), "name"):
            content = OmegaConf.load(file)
            # It would pass for the default: a plain training, for instance, where a regulariser was written.
            if "name" not in content and "defaults" not in content:
                raise ConfigError(f"{file} has no name; it begins with the line name: {choice}.")
    for group in ("regularizer", "format", "loader"):
        name = getattr(config, group).name
        if name not in groups[group]:
            raise ConfigError(f"{group}.name={name} is not one of: {', '.join(groups[group])}.")
        _check_taken(config, group, groups[group][name])


def _check_taken(config: Config, group: str, file: Path) -> None:
    """A choice takes exactly the optional options that its YAML file sets; another one would be silently ignored."""
    section, taken = getattr(config, group), set(OmegaConf.load(file)) - {"name", "defaults"}
    for f in fields(section):
        value = getattr(section, f.name)
        if f.default is not None or f.name in CHECKED_TOGETHER:
            continue
        if value is not None and f.name not in taken:
            raise ConfigError(
                f"{group}.{f.name} is not an option of {group}={section.name}, "
                f"which takes: {', '.join(sorted(map(str, taken))) or 'none'}"
                f"{'; arm=NAME chooses another arm of the experiment' if config.arms else ''}."
            )
        if value is None and f.name in taken:
            raise ConfigError(f"{group}.{f.name} of {group}={section.name} must be set.")
