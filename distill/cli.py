"""The front door: ``guard <command> key=value …``."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import textwrap
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from distill import __version__
from distill.compose import compose, group_choices, options
from distill.config import Config
from distill.errors import ConfigError, GuardError

COMMANDS = {
    "prepare": "import a data set, check every image, freeze the class order",
    "run": "every stage that is not complete: squeeze, recover, relabel, evaluate, report",
    "squeeze": "train the teacher on the real images",
    "recover": "optimise the distilled images",
    "relabel": "write the teacher's soft labels",
    "evaluate": "train students on the distilled set, test and attack them",
    "report": "compare runs in one table",
    "config": "print the resolved configuration",
}
SECTIONS = {
    "prepare": ("data_root", "dataset"),
    "squeeze": ("dataset", "teacher", "squeeze", "regularizer", "engine", "loader", "monitor"),
    "recover": ("recover", "monitor"),
    "relabel": ("relabel",),
    "evaluate": ("student", "relabel", "evaluate", "attacks", "loader", "monitor"),
}
GENERAL = ("name", "run_root", "data_root", "seed", "device", "threads", "method", "arm", "arms", "published")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong usage or configuration."""
    parsed = _parser().parse_args(arguments)
    if not parsed.debug:
        # A thread of TensorBoard that meets a full disk is heard of in the main thread, as one sentence.
        threading.excepthook = lambda failure: None
    try:
        return _dispatch(parsed)
    except KeyboardInterrupt:
        print("guard: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if parsed.debug:
            raise
        print(f"guard: {_sentence(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _sentence(error: BaseException) -> str:
    if isinstance(error, GuardError):
        return str(error)
    if isinstance(error, OSError):
        place = f" at {error.filename}" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"No space is left on the device{place}; free some and run the same command again."
        return f"{error.strerror or error}{place}; what is finished is kept, the same command continues."
    if "out of memory" in str(error):
        return f"The GPU is out of memory ({str(error).splitlines()[0]}); use smaller batches or more accumulation."
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {text}. --debug shows the traceback."


def _dispatch(parsed: argparse.Namespace) -> int:
    if parsed.command == "report":
        from distill.report import compare

        print(compare([Path(run) for run in parsed.runs], parsed.format))
        return 0
    config = compose(parsed.overrides, parsed.config_dir)
    if parsed.command == "prepare":
        _prepare(config, say=True)
        return 0
    configs = _arms(config, parsed.overrides, parsed.config_dir)
    if parsed.command == "config":
        for each in configs:
            print(OmegaConf.to_yaml(OmegaConf.structured(each)), end="---\n" if len(configs) > 1 else "")
        return 0
    if os.environ.get("RANK", "0") == "0" and parsed.command in ("run", "squeeze", "evaluate"):
        _prepare(config, say=False)
    from distill import pipeline

    worked = pipeline.run(configs, parsed.command)
    if parsed.command == "run" and os.environ.get("RANK", "0") == "0":
        _report(config, configs, worked)
    return 0


def _prepare(config: Config, say: bool) -> None:
    from data_prep import prepare

    prepared = prepare(config)
    if say:
        print(f"{prepared.name}: prepared in {Path(config.data_root) / config.dataset.name}")


def _arms(config: Config, overrides: Sequence[str], folder: str | None) -> list[Config]:
    """The configurations of an experiment: one for each arm, or just the one."""
    if not config.arms:
        if config.arm:
            raise ConfigError(f"arm={config.arm}: this configuration has no arms.")
        return [config]
    if config.arm and config.arm not in config.arms:
        raise ConfigError(f"arm={config.arm} is not one of: {', '.join(config.arms)}.")
    given = {text.split("=", 1)[0].lstrip("+~") for text in overrides}
    configs = []
    for arm in [config.arm] if config.arm else config.arms:
        own = [text for text in config.arms[arm] if not given & _names(text)]
        mine = compose([*own, *overrides], folder)
        mine.name = f"{config.name}/{arm}"
        configs.append(mine)
    return configs


def _names(override: str) -> set[str]:
    """The key that an override sets, and the config groups above it: a group that is given replaces an arm's options."""
    key = override.split("=", 1)[0]
    return {key} | {key[:end] for end, character in enumerate(key) if character == "."}


def _report(config: Config, configs: Sequence[Config], worked: bool) -> None:
    """The table of an experiment's runs on stdout; figures and tables beside them."""
    from distill import report

    folders = [Path(each.run_root) / each.name for each in configs]
    if worked:
        report.write(Path(config.run_root) / config.name, folders)
    print(report.compare(folders, "terminal"))
    print(f"TensorBoard: tensorboard --logdir {Path(config.run_root) / config.name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard",
        description="Distil image data sets into small, adversarially robust training sets.",
        epilog="guard <command> --help shows the options of a command, with their units and limits.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Command)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        if name == "report":
            command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that hold some")
            command.add_argument("--format", choices=("terminal", "markdown", "csv"), default="terminal")
            continue
        command.add_argument("overrides", nargs="*", metavar="key=value", help="options, and config groups by name")
        command.add_argument("--config-dir", help="folder with config groups of your own")
    return parser


class _Command(argparse.ArgumentParser):
    """A command whose help ends with its options; they are listed only when the help is shown."""

    def format_help(self) -> str:
        command = self.prog.split()[-1]
        return super().format_help() + ("" if command == "report" else "\n" + _option_list(command) + "\n")


def _option_list(command: str) -> str:
    wanted = SECTIONS.get(command)
    lines = ["config groups:"]
    for group, choices in group_choices().items():
        names = textwrap.fill(", ".join(choices), 110, initial_indent=f"  {group}=", subsequent_indent="      ")
        lines.append(names)
    lines += ["", "options, with their defaults before a config group changes them:"]
    for key, kind, field in options():
        section = key.split(".")[0]
        if wanted is not None and section not in wanted and key not in GENERAL:
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        name = getattr(kind, "__name__", str(kind)) if "[" not in str(kind) else str(kind)
        help = field.metadata["help"]
        extra = [f"unit {field.metadata['unit']}"] if field.metadata["unit"] else []
        extra += [f"one of {', '.join(field.metadata['choices'])}"] if field.metadata["choices"] else []
        extra += [f"at least {field.metadata['low']:g}"] if field.metadata["low"] is not None else []
        extra += [f"at most {field.metadata['high']:g}"] if field.metadata["high"] is not None else []
        extra += [f"greater than {field.metadata['above']:g}"] if field.metadata["above"] is not None else []
        text = f"{help} ({'; '.join(extra)})" if extra else help
        lines.append(f"  {key} ({name}, {default!r})")
        lines.append(textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
