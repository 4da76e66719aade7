"""What a user gets from the wheel: the packages, every YAML, the command, the license; usable outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "configs", "distill", "data_prep", "launchers")
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | QUIET | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither an old build/ nor this test's leftovers can play a part."""
    checkout, wheels = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheels")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, checkout / name)
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ".")
    run(*build, cwd=checkout)
    (built,) = wheels.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel; its requirements come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel)
    run(*install, cwd=folder)
    return folder


def test_the_wheel_holds_every_yaml_and_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    yamls = {f"distill/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    modules = {
        str(path.relative_to(ROOT))
        for room in ("distill", "data_prep", "launchers")
        for path in (ROOT / room).rglob("*.py")
    }
    lists = {str(path.relative_to(ROOT)) for path in (ROOT / "distill").rglob("*.txt")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "distill/report").glob("page.*")}
    assert len(pages) >= 4
    assert (yamls | modules | lists | pages | {"distill/py.typed"}) - names == set()
    assert [name for name in names if name.startswith(("tests/", "benchmarks/", "configs/"))] == []


def test_the_wheel_says_its_license_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "guard = distill.cli:main" in archive.read(entry_points).decode()
    assert any(Path(name).name == "LICENSE" for name in archive.namelist())


def test_the_installed_wheel_composes_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import distill, pathlib; from distill.compose import compose, config_folder, group_choices\n"
        "config = compose(['experiment=demo'])\n"
        "for name in group_choices()['experiment']: compose([f'experiment={name}'])\n"
        "print(pathlib.Path(distill.__file__).parent, config_folder(), config.name, *config.arms, sep='\\n')"
    )
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    package = installed / "distill"
    assert lines == [str(package), str(package / "configs"), "demo", "sre2l", "guard"]


def test_the_installed_command_prints_a_configuration(installed: Path, tmp_path: Path) -> None:
    text = run(installed / "bin" / "guard", "config", "experiment=demo", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "name: demo" in text
    assert list(tmp_path.iterdir()) == []
