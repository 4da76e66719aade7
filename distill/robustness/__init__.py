"""Attacks on networks, accuracies under attack, the curvature of the loss, and figures made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.robustness.results import AttackReport
    from distill.robustness.runner import attack_accuracy
    from distill.robustness.spectrum import input_spectrum, top_eigenvalues

__all__ = ["AttackReport", "attack_accuracy", "input_spectrum", "top_eigenvalues"]


def __getattr__(name: str) -> Any:
    """Load torch with the first use, so that tables, which need only the figures, come at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("input_spectrum", "top_eigenvalues"):
        from distill.robustness import spectrum

        return getattr(spectrum, name)
    from distill.robustness import runner

    return getattr(runner, name)
