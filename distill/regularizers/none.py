"""Plain cross-entropy: the squeeze of SRe²L."""

from __future__ import annotations

from dataclasses import dataclass

from distill.regularizers.base import Regularizer


@dataclass
class NoRegularizer(Regularizer):
    """Adds nothing."""


REGULARIZER = NoRegularizer
