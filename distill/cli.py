"""The front door: ``guard <command> key=value …``."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from distill import __version__
from distill.compose import compose, group_choices, names_of, options
from distill.config import Config
from distill.environment import speaks
from distill.errors import ConfigError
from distill.told import told

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
MAIN_ARM = "main"
"""What an experiment without arms becomes when it has controls."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped by a signal and to be continued,
        76 given up because another process of the run had ended.
    """
    parsed = _parser().parse_args(arguments)
    return told(lambda: _dispatch(parsed), debug=parsed.debug, last=arguments is None).code


def _dispatch(parsed: argparse.Namespace) -> int:
    if parsed.command == "report":
        return _compare(parsed.runs, parsed.format, parsed.html)
    if parsed.command == "status":
        return _status(parsed.runs, parsed.watch)
    if parsed.command == "verify":
        return _verify(parsed.runs)
    if parsed.command in ("logs", "cancel"):
        from launchers import status

        run = Path(parsed.run)
        print(status.logs(run, parsed.stage, parsed.lines) if parsed.command == "logs" else status.cancel(run))
        return 0
    if parsed.command == "spectrum":
        return _spectrum(parsed)
    if parsed.command == "tensorboard":
        from distill.report.serve import serve

        serve(Path(parsed.run), parsed.host, parsed.port)
        return 0
    if parsed.command == "export":
        from data_prep.formats.beton_images import write_beton
        from distill.exchange import export

        target = Path(parsed.to) if parsed.to else None
        print(export(Path(parsed.run), parsed.format, target, parsed.images, parsed.quality, write_beton=write_beton))
        return 0
    ignored = [text for text in parsed.overrides if "cluster" in names_of(text)]
    if ignored and parsed.command not in ON_CLUSTERS:
        raise ConfigError(f"{ignored[0]} is about guard launch; guard {parsed.command} works on this machine.")
    configs = _configs(parsed.overrides, parsed.config_dir)
    if parsed.command == "prepare":
        from data_prep import prepare

        print(prepare(configs[0]).describe())
        return 0
    if parsed.command == "config":
        for each in configs:
            print(OmegaConf.to_yaml(OmegaConf.structured(each)), end="---\n" if len(configs) > 1 else "")
        return 0
    from data_prep import prepare
    from distill import pipeline

    if configs[0].controls:
        from distill.controls import check_place, share_teachers

        check_place(configs[0])
        for told in share_teachers(configs):
            if parsed.command in ("run", "squeeze", "launch") and speaks():
                print(f"guard: {told}", file=sys.stderr)
    if parsed.command == "launch":
        from launchers.launch import launch

        options = ["--config-dir", parsed.config_dir] if parsed.config_dir else []
        launch(configs, ["guard", "launch", *options, *parsed.overrides], dry_run=parsed.dry_run)
        return 0
    pipeline.run(configs, parsed.command, prepare)
    if speaks() and parsed.command in ("run", "recover", "evaluate"):
        _report(configs, parsed.command)
    return 0


def _compare(paths: Sequence[str], form: str, html: str | None) -> int:
    """The table on stdout; where the page lies on stderr, so that a table can be piped."""
    from distill.report import compare, write_page

    print(compare(paths, form), flush=True)
    page = Path(html) if html else _common_folder(paths) / "report.html"
    if page.is_dir():
        raise ConfigError(f"--html {page} is a folder; give the name of a file in it.")
    if write_page(page, paths):
        print(f"Page: {page}", file=sys.stderr)
    return 0


def _common_folder(paths: Sequence[str]) -> Path:
    """The one folder that was given, or of several the first one's parent."""
    return Path(paths[0]) if len(paths) == 1 else Path(paths[0]).absolute().parent


def _status(paths: Sequence[str], seconds: float | None) -> int:
    """How far runs and their jobs are, once or again and again."""
    from distill.report.runs import run_folders
    from distill.report.trainings import describe_trainings
    from distill.sharing.status import describe
    from launchers.status import describe as describe_jobs

    while True:
        texts = []
        for path in map(Path, paths):
            jobs = describe_jobs(path)
            # Before the first job has begun there is no run yet.
            runs = run_folders([path], none=bool(jobs))
            texts += [f"{path}\n{jobs}"] if jobs and runs != [path] else []
            for run in runs:
                texts.append(describe(run, describe_trainings(run)))
                texts += [jobs] if jobs and run == path else []
        if seconds is None:
            print("\n".join(texts))
            return 0
        clear = "\033[H\033[J" if sys.stdout.isatty() else ""
        print(clear + "\n".join(texts), flush=True)
        time.sleep(seconds)


def _verify(paths: Sequence[str]) -> int:
    from distill.report.runs import run_folders
    from distill.sharing.verify import verify

    damaged = False
    for run in run_folders(paths):
        lines, faults = verify(run)
        print("\n".join(lines))
        for fault in faults:
            print(f"guard: {fault}", file=sys.stderr)
        damaged |= bool(faults)
    return int(damaged)


def _spectrum(parsed: argparse.Namespace) -> int:
    from distill.report.runs import run_folders
    from distill.report.spectra import write_spectra
    from distill.stages.spectrum import SpectrumOptions, measure, parse_radii

    options = SpectrumOptions(parsed.images, parsed.top, parse_radii(parsed.radii), parsed.precision, parsed.split)
    runs = run_folders(parsed.runs)
    for run in runs:
        measure(run, options, device=parsed.device, data_root=Path(parsed.data_root) if parsed.data_root else None)
        print(f"{run}: spectrum complete", flush=True)
    first = Path(parsed.runs[0])
    print(write_spectra(runs, None if first in runs else first))
    return 0


def _configs(overrides: Sequence[str], folder: str | None) -> list[Config]:
    """The configurations that a command line asks for: one for each arm of an experiment, or just the one."""
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
    return configs or [config]


def _departs(given: set[str]) -> bool:
    """Whether overrides change more than seeds, places and speed: then published accuracies do not stand beside."""
    harmless = {key for key, _, field in options() if not field.metadata["result"]}
    # Paths of what results are made from: the content counts, in the fingerprints.
    others_work = given & {"recover.images", "recover.teachers"}
    return bool(others_work or given - harmless - {"experiment", "engine", "loader", "seed", "evaluate.seeds"})


def _report(configs: Sequence[Config], command: str) -> None:
    """Pictures and tables beside the runs, where they are missing or old; after the last stage the table on stdout."""
    from distill import report

    runs = [Path(each.run_root) / each.name for each in configs]
    folder = runs[0].parent if configs[0].arms or configs[0].controls else runs[0]
    report.write(folder, runs)
    if command != "recover":
        print(report.compare(runs, "terminal"))
        if (folder / "report.html").is_file():
            print(f"Page: {folder / 'report.html'}")
        print(f"TensorBoard: tensorboard --logdir {folder}")


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
        if name in ("report", "status", "verify"):
            command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that hold some")
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
                command.add_argument("--lines", type=int, default=20, metavar="N", help="of each log (default: 20)")
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


def _seconds(text: str) -> float:
    if not float(text) > 0:
        raise ValueError
    return float(text)


def _spectrum_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that hold some")
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
