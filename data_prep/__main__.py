"""``python -m data_prep prepare key=value …`` and ``python -m data_prep verify FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.prepare import prepare
from data_prep.verify import verify
from distill.compose import compose
from distill.errors import sentence
from distill.say import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage or configuration."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Prepare and verify data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="import a data set and check every image; the same as guard prepare")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="dataset=imagenette dataset.source=FILE …")
    one.add_argument("--debug", action="store_true", help="show the traceback of an error")
    two = commands.add_parser("verify", help="re-read every image of a prepared folder")
    two.add_argument("folder", type=Path)
    two.add_argument("--debug", action="store_true", help="show the traceback of an error")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "verify":
            print(f"{chosen.folder}: {verify(chosen.folder)} images are as they were prepared.")
        else:
            print(prepare(compose(chosen.overrides)).describe())
    except KeyboardInterrupt:
        say("data_prep: interrupted; run the same command again.")
        return 1
    except Exception as error:
        if chosen.debug:
            raise
        say(f"data_prep: {sentence(error)}")
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
