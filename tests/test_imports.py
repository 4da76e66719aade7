"""Imports point one way, optional packages have one door, and ``import distill`` is light."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("distill", "data_prep", "launchers")
OPTIONAL = {
    "deepspeed": ["distill/training/deepspeed_engine.py"],
    "ffcv": ["distill/data/ffcv_loader.py", "data_prep/*ffcv*"],
    "nvidia.dali": ["distill/data/dali_loader.py"],
    "pyarrow": ["distill/exchange/parquet.py"],
    "submitit": ["launchers/*"],
    "torchattacks": ["distill/robustness/attacks.py"],
}
LEVELS = [
    [
        "distill",
        "distill.errors",
        "distill.say",
        "distill.environment",
        "distill.option",
        "distill.config_machine",
        "distill.config_cluster",
        "distill.config",
        "distill.limits",
        "distill.compose",
        "distill.command_line",
    ],
    ["distill.progress", "distill.randomness", "distill.files", "distill.provenance"],
    ["distill.run_folder", "distill.sharing"],
    ["distill.regularizers", "distill.losses", "distill.models", "distill.data"],
    ["distill.training", "distill.robustness", "distill.recovery", "distill.exchange"],
    ["distill.stages"],
    ["distill.graph", "distill.preflight", "distill.pipeline", "distill.controls", "distill.arms", "distill.told"],
    ["launchers", "data_prep", "distill.report"],
    ["distill.cli"],
    ["distill.__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

Imports = Mapping[str, set[str]]


def room_of(name: str) -> str:
    """The room that a module, or a name inside one, belongs to: distill.data.crops -> distill.data."""
    parts = name.removesuffix(".__init__").split(".")
    if parts[0] != "distill":
        return parts[0]
    candidate = ".".join(parts[:2])
    inside = ROOT / "distill" / parts[1] if len(parts) > 1 else ROOT / "distill"
    return candidate if inside.is_dir() or inside.with_suffix(".py").is_file() else "distill"


def names_imported(text: str) -> set[str]:
    """Every dotted name that a source text imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> dict[Path, set[str]]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {file.relative_to(ROOT): names_imported(file.read_text()) for file in files}


def rooms(imports: Mapping[Path, Iterable[str]]) -> dict[str, set[str]]:
    """Which rooms each room imports, itself left out."""
    graph: dict[str, set[str]] = {}
    for file, names in imports.items():
        own = room_of(".".join(file.with_suffix("").parts))
        theirs = {room_of(name) for name in names if name.split(".")[0] in PACKAGES}
        graph.setdefault(own, set()).update(theirs - {own})
    return graph


def wrong_ways(graph: Imports) -> list[str]:
    """Imports that point up, and those of data_prep that reach beside its data."""
    wrong = [f"{a} -> {b}" for a, targets in graph.items() for b in targets if LEVEL[b] > LEVEL[a]]
    allowed = {"distill.data", *LEVELS[0], *LEVELS[1], *LEVELS[2]}
    return wrong + [f"data_prep -> {b}" for b in graph.get("data_prep", set()) - allowed]


def strangers(imports: Mapping[Path, Iterable[str]]) -> list[str]:
    """Files that import an optional package and are not its door."""
    return [
        f"{file} -> {package}"
        for file, names in imports.items()
        for package, doors in OPTIONAL.items()
        if any(name == package or name.startswith(package + ".") for name in names)
        and not any(fnmatch.fnmatch(str(file), door) for door in doors)
    ]


def test_every_room_has_a_place() -> None:
    assert set(rooms(sources())) <= set(LEVEL), "a new room needs a level in LEVELS, and a line in the design"


def test_imports_point_one_way() -> None:
    assert wrong_ways(rooms(sources())) == []


def test_rooms_of_one_level_have_no_cycle() -> None:
    graphlib.TopologicalSorter(rooms(sources())).prepare()


def test_optional_packages_have_one_door() -> None:
    assert strangers(sources()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("distill/data/crops.py", "from distill.stages import squeeze"),
        ("distill/pipeline.py", "def f():\n    import distill.cli"),
        ("distill/regularizers/curvature.py", "from distill import training"),
        ("data_prep/prepare.py", "import distill.models.resnet"),
    ],
)
def test_the_walk_sees_a_wrong_way(file: str, line: str) -> None:
    assert len(wrong_ways(rooms({Path(file): names_imported(line)}))) == 1


def test_the_walk_sees_a_stranger() -> None:
    names = names_imported("from nvidia.dali import fn\nimport submitit")
    assert len(strangers({Path("distill/stages/squeeze.py"): names})) == 2
    assert strangers({Path("launchers/slurm.py"): {"submitit"}}) == []


def test_import_is_light() -> None:
    """The front door, the schema and composing must not load what only a stage needs."""
    heavy = ["torch", "torchvision", "torchattacks", "scipy", "sklearn", "matplotlib", "tensorboard", "PIL"]
    code = (
        "import sys, distill, distill.config, distill.compose, distill.cli\n"
        f"print(*(name for name in {heavy} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
