"""Copies of runs of bytes between two memories that this process knows, of GPUs or locked. Needs a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.runs import BlockRun, evenly_spaced


def copy_runs_async(target: int, source: int, runs: Sequence[BlockRun], stream: int) -> None:
    """Copy these runs of bytes behind the pointers, ordered in `stream`; evenly spaced ones are one copy."""
    for first, num_runs, source_step, target_step in evenly_spaced(runs, cudart.MAX_PITCH):
        to, begin = target + first.target, source + first.source
        if num_runs == 1:
            cudart.copy_async(to, begin, first.length, stream)
        else:
            cudart.copy_rows_async(to, begin, (target_step, source_step), first.length, num_runs, stream)
