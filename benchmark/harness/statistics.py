"""Statistics of measured values: a percentile, and a median with its range as text. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np


def percentile(values: Sequence[float], percent: float) -> float:
    """Linearly interpolated between the two values beside it, as the load test has it."""
    return float(np.percentile(np.asarray(values), percent))


def median_text(values: Sequence[float]) -> str:
    """ "1.25 (1.10 .. 1.40)": the median, and the range of the rounds that it is taken over."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"
