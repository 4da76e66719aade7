"""Distil huge image data sets into small, adversarially robust training sets (GUARD, AAAI 2025).

``import distill`` is light: torch and the other heavy libraries are loaded by the subpackage that needs them.
"""

__version__ = "0.1.0"
