"""Finds the coefficients of the latency model from measured steps, by least squares of the relative error.

A file holds one JSON object a line; scripts/bench steps writes them:

    {"kind": "prefill", "lengths": [512, 100], "context": 0, "batch": 2, "seconds": 0.0312}
    {"kind": "decode", "lengths": [], "context": 8192, "batch": 8, "seconds": 0.0051}

`lengths` are the prompts of a prefill step, each computed whole; `context` is the sum of the contexts of a decode
step's rows, each with the token that is computed. Steps that were measured often are one median a line, or many lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError
from baton.simulator.latency import Cost
from baton.simulator.record import percentile

Count = Annotated[int, Meta(ge=0)]


class MeasuredStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured step."""

    kind: Literal["prefill", "decode"]
    lengths: tuple[Annotated[int, Meta(ge=1)], ...]
    context: Count
    batch: Annotated[int, Meta(ge=1)]
    seconds: Annotated[float, Meta(gt=0)]

    @property
    def terms(self) -> tuple[float, float, float]:
        """What the coefficients a, b and c are multiplied with."""
        if self.kind == "prefill":
            return 1.0, float(sum(self.lengths)), float(sum(length**2 for length in self.lengths))
        return 1.0, float(self.context), float(self.batch)


@dataclass(frozen=True, slots=True)
class Fit:
    """The coefficients for one kind of step, and how far they are from what was measured."""

    cost: Cost
    steps: int
    median_error: float
    """Relative, 0.1 is ten per cent."""
    p90_error: float
    worst_error: float


def read_steps(path: Path) -> list[MeasuredStep]:
    """Raises SettingsError, naming the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    steps = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                steps.append(msgspec.json.decode(line, type=MeasuredStep))
            except DECODE_ERRORS as error:
                raise SettingsError(f"{path}:{number}: {error}") from None
    return steps


def fit(steps: Sequence[MeasuredStep]) -> Fit:
    """Of steps of one kind; no coefficient is negative. Raises SettingsError for fewer than three different ones."""
    if len({step.terms for step in steps}) < 3:
        raise SettingsError("three different steps are needed to find three coefficients")
    terms = np.array([step.terms for step in steps])
    seconds = np.array([step.seconds for step in steps])
    found = _least_squares(terms / seconds[:, None], np.ones(len(steps)))
    errors = sorted(np.abs(terms @ found / seconds - 1.0).tolist())
    cost = Cost(*(float(coefficient) for coefficient in found))
    return Fit(cost, len(steps), percentile(errors, 50), percentile(errors, 90), errors[-1])


def _least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |matrix x - target|, [rows, 3] and [rows]: every choice of columns is tried."""
    scale = np.abs(matrix).max(axis=0)
    best, best_error = np.zeros(3), float("inf")
    for size in (1, 2, 3):
        for columns in combinations(range(3), size):
            chosen = list(columns)
            part = np.linalg.lstsq(matrix[:, chosen] / scale[chosen], target, rcond=None)[0] / scale[chosen]
            error = float(np.sum((matrix[:, chosen] @ part - target) ** 2))
            if (part >= 0).all() and error < best_error:
                best, best_error = np.zeros(3), error
                best[chosen] = part
    return best
