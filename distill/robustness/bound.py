"""What was measured of the loss around test images, and the bound of Eq. 6 made from it. Needs NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from distill.errors import ArtifactError
from distill.files import write_atomic

Array = NDArray[np.float64]
CURVED = 0.01
"""λ₁ from which on an image counts as curved: a step of 1 in normalised pixels then adds 0.005 to its loss."""


@dataclass(frozen=True)
class Spectrum:
    """The loss of one network around N images, to second order, beside its measured maximum at R radii.

    Lengths are L2 over all values of one image in normalised pixels, and losses natural logarithms.

    Attributes:
        eigenvalues: float64 (N, k), the largest algebraic eigenvalues of ∇²_x ℓ, descending; the first is λ₁.
        cosine: float64 (N,), |cos| between ∇_x ℓ and the eigenvector of λ₁; NaN where one of them vanishes.
        gradient_norm: float64 (N,), ‖∇_x ℓ‖₂.
        loss: float64 (N,), ℓ(x).
        indices: int64 (N,), positions of the images in the split that is stored, ``train`` or ``test``.
        radii: float64 (R,), ρ, ascending.
        adversarial_loss: float64 (N, R), the largest ℓ(x + v) that was found with ‖v‖₂ ≤ ρ.
    """

    eigenvalues: Array
    cosine: Array
    gradient_norm: Array
    loss: Array
    indices: NDArray[np.int64]
    radii: Array
    adversarial_loss: Array

    def write(self, path: Path) -> None:
        """Write one safetensors file, atomically, with a tensor for each attribute."""
        write_atomic(
            path, save({field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)})
        )

    @classmethod
    def read(cls, path: Path) -> Spectrum:
        """Read a file of ``write``. Raises ArtifactError when it is missing, damaged or something else."""
        try:
            return cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise ArtifactError(
                f"{path} is no spectrum ({error}); remove it and run the same command again."
            ) from error

    @property
    def profile(self) -> Array:
        """λ₁ of every image, (N,), descending: the curve of the paper's Fig. 2."""
        return np.sort(self.eigenvalues[:, 0])[::-1]

    @property
    def mean_cosine(self) -> float | None:
        """Mean |cos| over the images that have one; None when none has."""
        known = self.cosine[~np.isnan(self.cosine)]
        return float(known.mean()) if len(known) else None

    def bound(self, radius: float) -> dict[str, float]:
        """The three terms of Eq. 6 at ρ = ``radius``, any length, and their sum.

        Where λ₁ is negative the curvature term is 0: the maximum over the ball need not lie on its border, and Eq. 6,
        which puts it there, would be too low.

        Returns:
            ``{"loss": E[ℓ], "gradient": ρ E‖∇ℓ‖, "curvature": ½ρ² E[λ₁], "sum": …}``.
        """
        loss = float(self.loss.mean())
        gradient = radius * float(self.gradient_norm.mean())
        curvature = radius**2 / 2 * float(self.eigenvalues[:, 0].clip(min=0).mean())
        return {"loss": loss, "gradient": gradient, "curvature": curvature, "sum": loss + gradient + curvature}

    def bounds(self) -> list[dict[str, float]]:
        """For each radius the terms of ``bound``, ``"radius"`` and the measured ``"adversarial_loss"``, a mean."""
        measured = self.adversarial_loss.mean(axis=0)
        return [
            {"radius": float(radius), **self.bound(float(radius)), "adversarial_loss": float(found)}
            for radius, found in zip(self.radii, measured, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """Plain figures for JSON: λ₁ over the images, mean |cos| (None where there is none), and ``bounds``."""
        first = self.eigenvalues[:, 0]
        return {
            "images": len(first),
            "lambda_1": {"mean": float(first.mean()), "median": float(np.median(first)), "largest": float(first.max())},
            "curved": {"above": CURVED, "share": float((first > CURVED).mean())},
            "cosine": self.mean_cosine,
            "gradient_norm": float(self.gradient_norm.mean()),
            "loss": float(self.loss.mean()),
            "bounds": self.bounds(),
        }
