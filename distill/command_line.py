"""The words of the command line: commands, their options, and the help."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from distill import __version__
from distill.compose import group_choices, options

COMMANDS = {
    "prepare": "import a data set, check every image, freeze the class order",
    "run": "every stage that is not complete: squeeze, recover, relabel, evaluate, report",
    "squeeze": "train the teacher on the real images",
    "recover": "optimise the distilled images",
    "relabel": "write the teacher's soft labels",
    "evaluate": "train students on the distilled set, test and attack them",
    "launch": "submit every stage that is not complete to a cluster, as one graph of jobs",
    "report": "compare runs in one table, and write report.html",
    "status": "how far runs are: jobs, units done, in progress and left, rate, time left, workers, errors",
    "logs": "show the ends of the logs of a run that was launched",
    "cancel": "end the jobs of a run that was launched; what is done is kept",
    "verify": "check every file of runs against its checksum, and what was made from what",
    "spectrum": "measure the curvature of the loss of teachers and students, and the bound on the attacked loss",
    "tensorboard": "show a run in TensorBoard, while its workers go on",
    "export": "write the distilled images for other programs",
    "config": "print the resolved configuration",
}
SECTIONS = {
    "prepare": ("data_root", "dataset", "format"),
    "squeeze": ("dataset", "teacher", "squeeze", "regularizer", "engine", "format", "loader", "monitor"),
    "recover": ("recover", "monitor", "sharing"),
    "relabel": ("relabel", "sharing"),
    "evaluate": ("student", "relabel", "evaluate", "attacks", "format", "loader", "monitor", "sharing"),
}
EXPORTS = {
    "folder": (("jpeg", "png"), "image files with SRe²L's names"),
    "pt": (("float32", "uint8"), "torch file with images (float32: normalised) and labels, as in the DC and MTT line"),
    "beton": (("raw", "jpeg"), "FFCV"),
    "parquet": (("png", "jpeg"), "Hugging Face datasets"),
}
"""Formats, how each can store images (the usual way first), and what it is. A test holds them to distill.exchange,
which is too heavy to be loaded for the help."""
EXPORT_QUALITY = 95
PLAIN = ("report", "status", "logs", "cancel", "verify", "spectrum", "tensorboard", "export")
"""Commands that take no options of the configuration."""
ON_CLUSTERS = ("launch", "config")
"""Commands that take options of clusters."""
GENERAL = (
    "name",
    "run_root",
    "data_root",
    "seed",
    "device",
    "threads",
    "method",
    "arm",
    "arms",
    "controls",
    "published",
)


def build_parser() -> argparse.ArgumentParser:
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
        if name in ("report", "status", "verify"):
            command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders with runs below them")
            if name == "status":
                watch = "show it again every so many seconds, 5 when none are given, until Ctrl-C"
                command.add_argument("--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS", help=watch)
            if name != "report":
                continue
            command.add_argument("--format", choices=("terminal", "markdown", "csv"), default="terminal")
            page = "the page with everything (default: report.html in RUN; of several, in the first one's parent)"
            command.add_argument("--html", metavar="PATH", help=page)
            continue
        if name in ("logs", "cancel"):
            command.add_argument("run", metavar="RUN", help="run folder, or folder of an experiment, that was launched")
            if name == "logs":
                command.add_argument("stage", nargs="?", metavar="STAGE", help="of this stage or job (default: all)")
                command.add_argument("--lines", type=_lines, default=20, metavar="N", help="of each log (default: 20)")
            continue
        if name == "spectrum":
            _spectrum_options(command)
            continue
        if name == "tensorboard":
            command.add_argument("run", metavar="RUN", help="run folder, or a folder that holds some")
            command.add_argument("--port", type=int, metavar="N", help="(default: 6006, or the next that is free)")
            command.add_argument("--host", default="127.0.0.1", metavar="H", help="interface (default: 127.0.0.1)")
            continue
        if name == "export":
            command.add_argument("run", metavar="RUN", help="run folder with a complete distilled set")
            formats = "; ".join(f"{name}: {text} ({' or '.join(stored)})" for name, (stored, text) in EXPORTS.items())
            command.add_argument("--format", choices=EXPORTS, required=True, help=formats)
            command.add_argument("--to", metavar="PATH", help="file or folder to make (default: inside RUN/export)")
            command.add_argument(
                "--images",
                choices=list(dict.fromkeys(form for stored, _ in EXPORTS.values() for form in stored)),
                help="how images are stored (default: the first of the format)",
            )
            command.add_argument("--quality", type=int, metavar="1-100", help=f"of JPEG (default: {EXPORT_QUALITY})")
            continue
        command.add_argument("overrides", nargs="*", metavar="key=value", help="options, and config groups by name")
        command.add_argument("--config-dir", help="folder with config groups of your own")
        if name == "launch":
            command.add_argument(
                "--dry-run", action="store_true", help="print the graph and the scripts, submit nothing"
            )
    return parser


def _lines(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines.")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; RUN stands before --watch.")
    return seconds


def _spectrum_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders with runs below them")
    command.add_argument("--images", type=int, default=100, metavar="N", help="real images, 0: all (default: 100)")
    command.add_argument("--top", type=int, default=1, metavar="K", help="eigenvalues of each image (default: 1)")
    command.add_argument(
        "--radii",
        default="0.05,0.1,0.2,0.5,1",
        metavar="R,R,…",
        help="radii at which the loss is attacked, L2 in normalised pixels (default: 0.05,0.1,0.2,0.5,1)",
    )
    command.add_argument(
        "--precision", choices=("float32", "float64"), default="float32", help="of the networks (default: float32)"
    )
    command.add_argument(
        "--split", choices=("test", "validation", "train"), default="test", help="source of the images (default: test)"
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    command.add_argument("--data-root", metavar="PATH", help="folder of the prepared data sets (default: the run's)")


class _Command(argparse.ArgumentParser):
    """A command whose help ends with its options; they are listed only when the help is shown."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options may stand between the others, where argparse takes the others from one place alone."""
        parsed, rest = super().parse_known_args(args, namespace)
        if not any(text.startswith("-") for text in rest):
            for name in ("overrides", "runs"):
                if hasattr(parsed, name):
                    getattr(parsed, name).extend(rest)
                    rest = []
            if len(rest) == 1 and getattr(parsed, "stage", "") is None:
                parsed.stage = rest.pop()
        return parsed, rest

    def format_help(self) -> str:
        command = self.prog.split()[-1]
        return super().format_help() + ("" if command in PLAIN else "\n" + _option_list(command) + "\n")


def _option_list(command: str) -> str:
    wanted = SECTIONS.get(command)
    lines = ["config groups:"]
    for group, choices in group_choices().items():
        if group == "cluster" and command not in ON_CLUSTERS:
            continue
        names = textwrap.fill(", ".join(choices), 110, initial_indent=f"  {group}=", subsequent_indent="      ")
        lines.append(names)
    lines += ["", "options, with their defaults before a config group changes them:"]
    for key, kind, field in options():
        section = key.split(".")[0]
        if wanted is not None and section not in wanted and key not in GENERAL:
            continue
        if section == "cluster" and command not in ON_CLUSTERS:
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        name = getattr(kind, "__name__", str(kind)) if "[" not in str(kind) else str(kind)
        help = field.metadata["help"]
        extra = [f"unit {field.metadata['unit']}"] if field.metadata["unit"] else []
        extra += [f"one of {', '.join(field.metadata['choices'])}"] if field.metadata["choices"] else []
        extra += [f"at least {field.metadata['low']:g}"] if field.metadata["low"] is not None else []
        extra += [f"at most {field.metadata['high']:g}"] if field.metadata["high"] is not None else []
        extra += [f"less than {field.metadata['below']:g}"] if field.metadata["below"] is not None else []
        extra += [f"greater than {field.metadata['above']:g}"] if field.metadata["above"] is not None else []
        text = f"{help} ({'; '.join(extra)})" if extra else help
        lines.append(f"  {key} ({name}, {default!r})")
        lines.append(textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
