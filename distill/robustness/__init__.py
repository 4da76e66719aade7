"""Attacks on networks, accuracies under attack, and figures made from them."""

from distill.robustness.runner import AttackReport, attack_accuracy

__all__ = ["AttackReport", "attack_accuracy"]
