"""What is added to the squeeze loss: GUARD's curvature penalty and its rivals, one a file."""

from distill.regularizers.base import Regularizer, Surroundings, build_regularizer
from distill.regularizers.curvature import curvature_penalty

__all__ = ["Regularizer", "Surroundings", "build_regularizer", "curvature_penalty"]
