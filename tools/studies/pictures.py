"""What the pictures of the studies share; drawn without a display."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

matplotlib.use("Agg")


def band(axis: plt.Axes, x: Sequence[int], columns: list, colour: object, label: str) -> None:
    """A curve of the mean of each column, and the range of its values."""
    axis.plot(x, [statistics.mean(c) for c in columns], "o-", color=colour, label=label, markersize=3)
    axis.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.12)


def save(figure: Figure, path: Path) -> None:
    """Write the picture; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
