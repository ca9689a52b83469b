"""Where the rows of two pools lie, and which lie together at both ends, so that they move as one piece. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Places = Sequence[int] | npt.NDArray[np.int64]


class BlockRun(NamedTuple):
    """`length` blocks: the sender's from `source` on become the receiver's from `target` on."""

    source: int
    target: int
    length: int


class RowSpacing(NamedTuple):
    """Where the rows of a pool lie: `group_rows` without gaps are a group, and groups lie `group_bytes` apart. Blocks
    are groups of one row; the layers of a unit, which may have padding behind them, are one group."""

    row_bytes: int
    group_rows: int
    group_bytes: int

    @classmethod
    def even(cls, row_bytes: int) -> RowSpacing:
        return cls(row_bytes, 1, row_bytes)

    @property
    def has_gaps(self) -> bool:
        return self.group_rows * self.row_bytes != self.group_bytes

    def num_rows(self, size_bytes: int) -> int:
        """Of a pool of so many bytes."""
        return size_bytes // self.group_bytes * self.group_rows

    def places(self, rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Bytes from the begin of the pool to each of these rows."""
        group, row = np.divmod(np.array(rows, dtype=np.int64), self.group_rows)
        return group * self.group_bytes + row * self.row_bytes


def common_runs(source: Places, target: Places, step: int = 1) -> list[BlockRun]:
    """The fewest runs that move source[i] to target[i] for every i, in order; neighbours are `step` apart."""
    if len(source) != len(target):
        raise ValueError(f"{len(source)} places become {len(target)}")
    theirs, ours = np.asarray(source, dtype=np.int64), np.asarray(target, dtype=np.int64)
    apart = np.flatnonzero((np.diff(theirs) != step) | (np.diff(ours) != step)) + 1
    bounds = [0, *apart.tolist(), len(source)]
    return [
        BlockRun(int(theirs[first]), int(ours[first]), end - first) for first, end in pairwise(bounds) if end > first
    ]


class RunSeries(NamedTuple):
    """`num_runs` runs like `first`, each so many blocks behind the one before it; one alone is its own length apart."""

    first: BlockRun
    num_runs: int
    source_step: int
    target_step: int


def evenly_spaced(runs: Sequence[BlockRun], max_step: int) -> list[RunSeries]:
    """These runs in order, in series that overlap at neither end, with steps of at most `max_step` blocks.

    The units of a rank that a group of another size needs are one series, where blocks are consecutive.
    """
    steps = [
        (after.source - run.source, after.target - run.target) if after.length == run.length else (0, 0)
        for run, after in pairwise(runs)
    ]
    found, begin = [], 0
    while begin < len(runs):
        first, end, step = runs[begin], begin + 1, (runs[begin].length, runs[begin].length)
        if end < len(runs) and first.length <= min(steps[begin]) and max(steps[begin]) <= max_step:
            step = steps[begin]
            while end < len(runs) and steps[end - 1] == step:
                end += 1
        found.append(RunSeries(first, end - begin, *step))
        begin = end
    return found


def cut(blocks: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]] | None:
    """`blocks` as (first, length) of the given lengths; None unless they add up and each piece is consecutive."""
    if sum(lengths) != len(blocks) or any(length < 1 for length in lengths):
        return None
    pieces: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        piece = blocks[start : start + length]
        if any(after != before + 1 for before, after in pairwise(piece)):
            return None
        pieces.append((piece[0], length))
        start += length
    return pieces
