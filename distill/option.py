"""One documented field of the configuration: its default, help, unit and limits."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    length: int | None = None,
    result: bool = True,
) -> Any:
    """A documented dataclass field.

    Args:
        low, high: inclusive limits; of every element where the option is a list.
        above, below: exclusive limits.
        choices: the allowed values of a string.
        length: the number of elements that a list must have.
        result: False when the value cannot change what a stage computes.
    """
    metadata: dict[str, Any] = {"help": help, "unit": unit, "choices": choices, "length": length, "result": result}
    metadata |= {"low": low, "high": high, "above": above, "below": below}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
