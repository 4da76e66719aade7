"""The commands of docs/torchrun.md: torchrun, the launcher and Slurm take them as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from distill.cli import main
from launchers import torchrun

PAGE = Path(__file__).resolve().parent.parent / "docs/torchrun.md"
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.M | re.S)
SCRIPTS = [block for block in BLOCKS if block.startswith("#!/bin/bash")]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if " run " in line]


def test_the_page_has_all_ways() -> None:
    assert len(LINES) == 7
    assert sum("launchers.torchrun" in line for line in LINES) == 3
    assert sum("torchrun" in line.split() for line in LINES) == 3
    assert len(SCRIPTS) == 2
    for script in SCRIPTS:
        assert len(script.splitlines()) <= 15, "a dozen lines, and some that only go on"


@pytest.mark.parametrize("line", LINES)
def test_what_starts_ranks_is_right(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(re.sub(r"\$\w+", "4", line))
    if "launchers.torchrun" in words:
        monkeypatch.setattr(sys, "argv", words[words.index("launchers.torchrun") :])
        given = torchrun._parse()
        asked = parse_args(torchrun.arguments(given))
        command = given.command
    elif "torchrun" in words:
        asked = parse_args(words[words.index("torchrun") + 1 :])
        command = asked.training_script_args
    else:
        asked, command = None, words[words.index("distill") + 1 :]
    if asked is not None:
        assert (asked.training_script, asked.module, asked.max_restarts) == ("distill", True, 3)
        assert asked.standalone or asked.rdzv_endpoint.endswith(":29400")
    assert command[0] == "run"
    assert main(["config", *command[1:]]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_variable_that_is_read_is_told() -> None:
    source = (PAGE.parent.parent / "distill/environment.py").read_text()
    read = set(
        re.findall(r"\b(?:SLURM_\w+|GROUP_WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_\w+|WORLD_SIZE|(?:LOCAL_)?RANK)\b", source)
    )
    # Older names of one that is told.
    assert {name for name in read if f"`{name}`" not in PAGE.read_text()} <= {
        "SLURM_NODELIST",
        "SLURM_JOB_NODELIST",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_TASKS_PER_NODE",
    }
