"""Quantities as people read them: the same wording in the terminal and in the report."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

MISSING = "–"


def finite(value: Any) -> Any:
    """The value as JSON can hold it: scalars of torch and numpy unwrapped, NaN and infinities as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def number(value: float | None, digits: int = 3) -> str:
    """About `digits` significant digits; thousands separated, very small numbers as 1.2e-06."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{digits - 2}e}"
    return f"{value:,.{max(0, digits - 1 - max(size, -1))}f}"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 3 h 20 min."""
    if seconds is None:
        return MISSING
    if seconds < 99.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """A number of bytes in decimal units, as bandwidths are given."""
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} TB"


def when(iteration: int) -> str:
    """When the evaluation numbered t was made: before iteration t trained."""
    if iteration == 0:
        return "at the start"
    return f"after {iteration} iteration" + ("" if iteration == 1 else "s")


def printable(text: str) -> str:
    """Text with its control characters replaced: it must not move the cursor or recolour a terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def clip(text: str, limit: int) -> str:
    """Beginning and end of a long text, saying how much is left out between them."""
    if len(text) <= limit:
        return text
    head, tail = limit * 2 // 3, limit // 3
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[-tail:]}"
