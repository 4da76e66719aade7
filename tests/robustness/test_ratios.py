"""RR, I-RR, mean and spread, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from distill.robustness.metrics import improved_robustness_ratio, ratios, robustness_ratio, sample_deviation, summarise


def test_ratios() -> None:
    # C = 0.8, ā = 0.5, a_min = 0.4: RR = 1 − 0.3/0.4, I-RR = 1 − 0.3·0.4/0.64.
    assert robustness_ratio(0.8, [0.6, 0.4, 0.5]) == pytest.approx(0.25)
    assert improved_robustness_ratio(0.8, [0.6, 0.4, 0.5]) == pytest.approx(0.8125)
    assert robustness_ratio(0.8, [0.4]) == pytest.approx(0)


def test_undefined_ratios() -> None:
    assert robustness_ratio(0.8, [0.8, 0.8]) is None
    assert improved_robustness_ratio(0.8, [0.8, 0.8]) == 1
    assert robustness_ratio(0.8, []) is None
    assert improved_robustness_ratio(0.8, []) is None
    assert improved_robustness_ratio(0.0, [0.0]) is None


def test_ratios_compare_accuracies_on_the_same_images() -> None:
    attacks = [{"accuracy": 0.4, "clean": 0.8}, {"accuracy": 0.6, "clean": 0.8}]
    network = {"clean": {"top1": 0.95}, "attacks": attacks}
    assert ratios(network)["rr"] == pytest.approx(0.25)
    assert ratios({"clean": {"top1": 0.95}, "attacks": []}) == {"rr": None, "i_rr": None}


def test_sample_deviation() -> None:
    assert sample_deviation([1.0, 2.0, 6.0]) == pytest.approx(7**0.5)
    assert sample_deviation([1.0]) is None


def test_summary_of_students() -> None:
    def student(clean: float, *attacked: float) -> dict[str, Any]:
        attacks = [
            {"name": "pgd", "epsilon": epsilon, "accuracy": accuracy, "clean": clean}
            for epsilon, accuracy in zip((1.0, 0.5, None), attacked, strict=True)
        ]
        return {"clean": {"top1": clean, "top5": 1.0}, "attacks": attacks}

    summary = summarise([student(0.9, 0.5, 0.6, 0.7), student(0.7, 0.7, 0.7, 0.7)])
    assert summary["top1"] == {"mean": pytest.approx(0.8), "sd": pytest.approx(0.02**0.5), "n": 2}
    assert summary["attacks"]["pgd@1"]["mean"] == pytest.approx(0.6)
    assert list(summary["attacks"]) == ["pgd@1", "pgd@0.5", "pgd"]
    assert summary["rr"] == {"mean": pytest.approx(0.25), "sd": None, "n": 1}, "undefined for the second"
    assert summary["i_rr"]["n"] == 2
    assert summarise([student(0.9, 0.5, 0.6, 0.7)])["top1"]["sd"] is None
