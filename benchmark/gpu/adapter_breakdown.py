"""What adapters take of a step: us a layer by kinds of kernels, and when each launch of one layer began and ended.

`us` has each moment with the kernel that began first among those that run, so the kinds sum to the step; `own_us` has
the whole time of each kernel, which is more where they overlap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from baton.benchmark.gpu.step_breakdown import (
    GAP,
    NAME_LENGTH,
    PASSES,
    Interval,
    launches,
    middle_pass,
    recorded,
    span_ns,
    spent_ns,
)
from baton.benchmark.harness.json_lines import JsonLines
from baton.models.cuda.queue import Queue

KINDS = {
    "grouping": re.compile("_group_rows_kernel"),
    "shrink": re.compile("_shrink_ranks_kernel"),
    "expand": re.compile("_expand_ranks_kernel"),
    GAP: re.compile(f"{GAP}$"),
}
REST = "rest"
ONCE_A_LAYER = "_rope_write_kernel"


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.match(name)), REST)


def by_kind(spent: Sequence[tuple[str, int]], num_layers: int) -> dict[str, float]:
    """us a layer, of names of kernels and nanoseconds."""
    total = dict.fromkeys((*KINDS, REST), 0)
    for name, took in spent:
        total[kind_of(name)] += took
    return {kind: round(took / num_layers / 1e3, 2) for kind, took in total.items()}


def one_layer(intervals: Sequence[Interval]) -> Sequence[Interval]:
    """Of a pass, in its middle: from one launch that a layer has once to the next; none if there are not two."""
    found = [index for index, each in enumerate(intervals) if each.name.startswith(ONCE_A_LAYER)]
    middle = len(found) // 2
    return intervals[found[middle - 1] : found[middle]] if middle else ()


def of_pass(intervals: Sequence[Interval], num_layers: int) -> dict[str, object]:
    layer = one_layer(intervals)
    own = [(each.name, each.end_ns - each.begin_ns) for each in intervals]
    return {
        "span_ms": round(span_ns(intervals) / 1e6, 3),
        "kernels": len(intervals),
        "us": by_kind(list(spent_ns(intervals).items()), num_layers),
        "own_us": by_kind(own, num_layers),
        "layer": [(name[:NAME_LENGTH], begin, end) for name, begin, end in launches(layer)] if layer else [],
    }


def report(
    lines: JsonLines, queue: Queue, num_layers: int, cells: Sequence[tuple[dict[str, object], Callable[[], object]]]
) -> None:
    """A line for each cell's values and step. Call it last: what the profiler hooks may stay slower."""
    passes = recorded(queue, [run for _, run in cells for _ in range(PASSES)])
    if len(passes) != PASSES * len(cells):
        raise RuntimeError(f"{PASSES * len(cells)} passes ran, the trace has {len(passes)}")
    for index, (values, _) in enumerate(cells):
        chosen = middle_pass(passes[index * PASSES : (index + 1) * PASSES])
        lines.put("breakdown", **values, **of_pass(chosen, num_layers))
