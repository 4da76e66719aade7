"""Run folders as the stage evaluate leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.files import write_json
from distill.robustness.metrics import summarise

RunMaker = Callable[..., Path]


def network(
    seed: int | None, clean: float, attacked: dict[tuple[str, float | None], float], **more: Any
) -> dict[str, Any]:
    """A network's part of results.json; ``attacked`` is (name, radius) → accuracy."""
    specification = {"attack": "PGD", "arguments": {"steps": 20, "seed": seed}, "seed": seed, "batch_size": 100, **more}
    attacks = [
        {"name": name, "epsilon": epsilon, "accuracy": accuracy, "clean": clean, "count": 500}
        | {"specification": specification}
        for (name, epsilon), accuracy in attacked.items()
    ]
    return {"seed": seed, "clean": {"top1": clean, "top5": 1.0, "count": 500}, "attacks": attacks}


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """Write ``<root>/<name>/results.json`` with the figures of FIELD_NOTES unless told otherwise."""

    def make(
        name: str, regularizer: dict[str, Any], students: list[dict[str, Any]], root: str = "runs", **more: Any
    ) -> Path:
        results = {
            "name": name,
            "method": "sre2l",
            "regularizer": regularizer,
            "dataset": "digits",
            "ipc": 10,
            "seed": 0,
            "split": "test",
            "recover": {"bn_loss": 5.1, "teacher_top1": 0.991},
            "published": {},
            "teacher": network(None, 0.991, {("pgd20", 8.0): 0.9, ("pgd20", 16.0): 0.6}),
            "students": students,
            "summary": summarise(students),
            **more,
        }
        folder = tmp_path / root / name
        write_json(folder / "results.json", results)
        return folder

    return make
