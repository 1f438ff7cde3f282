"""Numbers of the command line."""

from __future__ import annotations

import math

import typer


def finite(value: float | None) -> float | None:
    """An option's value; typer's limits let NaN and, without a maximum, infinity pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value
