"""Losses of recovery and of student training, one a file."""

from distill.losses.batchnorm_matching import BatchNormMatching, batchnorm_matching
from distill.losses.soft_label_kl import soft_label_kl

__all__ = ["BatchNormMatching", "batchnorm_matching", "soft_label_kl"]
