"""The front door: ``guard <command> key=value …``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from distill.arms import configurations
from distill.command_line import ON_CLUSTERS, build_parser
from distill.compose import names_of
from distill.config import Config
from distill.environment import speaks
from distill.errors import ConfigError
from distill.files import printable
from distill.say import say
from distill.told import told


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped by a signal and to be continued,
        76 given up because another process of the run had ended.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser().parse_args(given)

    def work() -> int:
        _check_encoding(given)
        return _dispatch(parsed)

    return told(work, debug=parsed.debug, last=arguments is None).code


def _check_encoding(arguments: Sequence[str]) -> None:
    """Paths stand in files and tables, which are UTF-8."""
    for text in arguments:
        if text != printable(text):
            raise ConfigError(f"{text!r} is no UTF-8; rename the folder, or go there by a link with another name.")


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
    configs = configurations(parsed.overrides, parsed.config_dir)
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
    from distill.preflight import check_place

    for each in configs:
        check_place(each)
    if configs[0].controls:
        from distill.controls import share_teachers

        for told in share_teachers(configs):
            if parsed.command in ("run", "squeeze", "launch") and speaks():
                say(f"guard: {told}")
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

    page = Path(html) if html else _common_folder(paths) / "report.html"
    if page.is_dir():
        raise ConfigError(f"--html {page} is a folder; give the name of a file in it.")
    if html and page.parent.is_file():
        raise ConfigError(f"--html {page} lies in {page.parent}, which is a file and no folder.")
    print(compare(paths, form), flush=True)
    if write_page(page, paths):
        say(f"Page: {page}")
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
            say(f"guard: {fault}")
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
