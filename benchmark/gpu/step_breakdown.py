"""The time of a step by groups of kernels and gaps between them, beside the least that each group can take.

A pass is measured as a whole: a decode step, or all chunks of a cell's prompts. Passes are separated in the trace by a
kernel that only waits: it runs before each, so that a pass of one step is launched before its first kernel runs.

Kernels that start early (programmatic dependent launch) overlap the end of the one before, and wait for it. So each
moment belongs to the kernel that began first among those that run; kernels and gap then sum to the pass, exactly.

The profiler slows launches, and the GPU between kernels. `span_ms` is of the trace, beside `timed_ms` without it, and
`timed_gap_ms` is what `timed_ms` leaves when all kernels are taken from it: where launches bind, that is the gap to
believe. All is timed before the profiler starts, once for all cells: what it hooks may stay slower.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from baton.benchmark.gpu.ceilings import Ceilings
from baton.benchmark.harness.json_lines import JsonLines
from baton.kernels import ExpertLinears, HeldWeight, Linear
from baton.kernels.routing import expected_experts
from baton.models.batch import Row
from baton.models.config import ModelConfig
from baton.models.cuda.queue import Queue
from baton.models.layer_weights import LayerWeights, Weights
from baton.models.layers import ExpertsMlp

PASSES = 7
WAIT_CYCLES = 40_000_000
"""About 20 ms: a step of some hundred launches under the profiler takes the host less."""
WAIT, GAP, OTHER = "spin_kernel", "gap", "other"
GROUPS = {
    "dequantise": r"_dequantise_",
    "copy": r"Mem(cpy|set) ",
    "attention": r"_?(decode|prefill)(_fp8)?_attention_kernel|_prefill_kernel|_widen_kernel"
    r"|_(latent_decode|latent_prefill|expand|absorb|raise)_kernel",
    "norm": r"_(whole_)?norm_kernel",
    "rope_write": r"_(rope_write|kv_write|latent_write|rotate_queries)_kernel",
    "activation": r"_act_and_mul(_codes)?_kernel|_quantise_kernel",
    "draw": r"_(best_of_block|best_of_rows?|scatter|prepare|pass|threshold|block|row|propose|accept|offer|entries)"
    r"_kernel",
    "inputs": r"_(gather(_drafts)?|inputs|share_out)_kernel|.*(index_?select|vectorized_gather|CatArray)",
    "ranks": r"_meet_kernel",
    "adapters": r"_(group_rows|(shrink|expand|embed)_ranks|(shrink|expand)_experts|embed|head|scale_rows"
    r"|(absorb|raise)_pairs|expand_latents)_kernel",
    "routing": r"_(router|choose|order|spread)_kernel",
    "linear": r"_(linear\w*|gated_product|product_8bit|gather_columns|experts\w*)_kernel"
    r"|.*(nvjet|gemm|gemv|cutlass|cublas|splitK)",
}
"""Patterns of kernels' names, from their beginning. `draw` has what is set by index too, `inputs` all that is read by
index: a step's inputs, embeddings, temperatures of slots. `linear` includes the product with the vocabulary,
and products of experts."""
_PATTERNS = {group: re.compile(pattern, re.IGNORECASE) for group, pattern in GROUPS.items()}
NAME_LENGTH = 120


class Interval(NamedTuple):
    """A kernel, or a copy, on the GPU."""

    name: str
    begin_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Profiled:
    """One cell to profile."""

    values: dict[str, object]
    """What its line begins with."""
    run: Callable[[], object]
    """A pass; returns when the GPU has ended it."""
    timed_ms: float
    """A pass without the profiler."""
    floors_s: dict[str, float]
    launches: bool = False
    """Whether each launch is written, too."""


# -- of a trace


def group_of(name: str) -> str:
    return next((group for group, pattern in _PATTERNS.items() if pattern.match(name)), OTHER)


def passes_of(intervals: Iterable[Interval]) -> list[list[Interval]]:
    """Each pass in the order of begin, without the wait before it."""
    passes: list[list[Interval]] = []
    for interval in sorted(intervals, key=lambda each: (each.begin_ns, each.end_ns)):
        if WAIT in interval.name:
            passes.append([])
        elif passes:
            passes[-1].append(interval)
    return passes


def span_ns(intervals: Sequence[Interval]) -> int:
    return max(each.end_ns for each in intervals) - min(each.begin_ns for each in intervals)


def spent_ns(intervals: Sequence[Interval]) -> dict[str, int]:
    """Of a pass in the order of begin, by kernel name; GAP: nothing ran. They sum to the span."""
    spent = {GAP: 0}
    reached = intervals[0].begin_ns
    for name, begin, end in intervals:
        spent[GAP] += max(0, begin - reached)
        spent[name] = spent.get(name, 0) + max(0, end - max(begin, reached))
        reached = max(reached, end)
    return spent


def summary(passes: Sequence[Sequence[Interval]], timed_ms: float, floors_s: dict[str, float]) -> dict[str, object]:
    """Of the pass whose span is the median one, so that the parts of a line sum to it."""
    chosen = middle_pass(passes)
    middle, spent = span_ns(chosen), spent_ns(chosen)
    gap = spent.pop(GAP)
    grouped = dict.fromkeys((*GROUPS, OTHER), 0)
    for name, took in spent.items():
        grouped[group_of(name)] += took
    parts = {
        group: {"ms": _ms(took), "share": round(took / middle, 4)}
        | ({"floor_ms": round(floors_s[group] * 1e3, 4)} if group in floors_s else {})
        for group, took in {**grouped, GAP: gap}.items()
    }
    return {
        "span_ms": _ms(middle),
        "timed_ms": round(timed_ms, 4),
        "timed_gap_ms": round(timed_ms - (middle - gap) / 1e6, 4),
        "kernels": len(chosen),
        "parts": parts,
        OTHER: {name[:NAME_LENGTH]: _ms(took) for name, took in spent.items() if group_of(name) == OTHER},
    }


def middle_pass(passes: Sequence[Sequence[Interval]]) -> Sequence[Interval]:
    """The one whose span is the median."""
    if not all(passes):
        raise RuntimeError("the trace has a pass without kernels")
    middle = statistics.median_low(span_ns(each) for each in passes)
    return next(each for each in passes if span_ns(each) == middle)


def launches(intervals: Sequence[Interval]) -> list[tuple[str, float, float]]:
    """Each launch of a pass: its name, and when it began and ended, in us from the beginning of the pass."""
    began = intervals[0].begin_ns
    return [(name, (begin - began) / 1e3, (end - began) / 1e3) for name, begin, end in intervals]


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 4)


# -- the least that a group can take


def floors_s(
    config: ModelConfig, weights: Weights, key_bytes: float, steps: Sequence[Sequence[Row]], ceilings: Ceilings
) -> dict[str, float]:
    """Seconds of a pass. Products read their weights, attention keys and values, at the rate of a copy; or either
    computes at the rate of a large product, if that takes longer. key_bytes: of a key of one head, its scale
    included."""
    return {
        "linear": sum(_products_s(weights, rows, ceilings) for rows in steps),
        "attention": sum(_attention_s(config, key_bytes, rows, ceilings) for rows in steps),
    }


def _products_s(weights: Weights, rows: Sequence[Row], ceilings: Ceilings) -> float:
    """Behind the last layer's attention only rows that draw are computed."""
    new, drawn = sum(row.num_new for row in rows), _drawn(rows)
    *before, last = weights.layers
    of_all = sum(_product_s(each, new, ceilings) for layer in before for each in _attention_products(layer))
    of_all += sum(_mlp_s(layer, new, ceilings) for layer in before) + _product_s(last.attention.qkv, new, ceilings)
    of_drawn = sum(_product_s(each, drawn, ceilings) for each in (last.attention.o, weights.lm_head))
    return of_all + of_drawn + _mlp_s(last, drawn, ceilings)


def _attention_products(layer: LayerWeights) -> tuple[Linear, ...]:
    return layer.attention.qkv, layer.attention.o


def _mlp_s(layer: LayerWeights, num_rows: int, ceilings: Ceilings) -> float:
    """Of experts those that so many tokens choose, if each is chosen as often as another."""
    shape, total = layer.shape.mlp, 0.0
    for held in layer.mlp.held:
        if isinstance(held, ExpertLinears):
            assert isinstance(shape, ExpertsMlp), "experts are of this shape"
            part = expected_experts(num_rows, shape.routing) / shape.routing.num_experts
            total += _product_s(held, num_rows * shape.routing.top_k, ceilings, part)
        else:
            total += _product_s(held, num_rows, ceilings)
    return total


def _product_s(held: HeldWeight, num_rows: int, ceilings: Ceilings, read: float = 1.0) -> float:
    """Arithmetic at the rate of bfloat16, whatever the format; read: the part of the weights that is."""
    if not num_rows:
        return 0.0
    flops = 2 * num_rows * held.num_outputs * held.num_inputs
    return max(read * held.size_bytes / ceilings.copy_bytes_s, flops / ceilings.matmul_flop_s)


def _attention_s(config: ModelConfig, key_bytes: float, rows: Sequence[Row], ceilings: Ceilings) -> float:
    """The last layer attends only if a row draws."""
    total = 0.0
    for windowed in config.windowed_layers[: config.num_layers if _drawn(rows) else -1]:
        window = config.sliding_window if windowed else None
        keys = sum(num_keys(row.num_new, row.start, window) for row in rows)
        pairs = sum(num_pairs(row.num_new, row.start, window) for row in rows)
        size_bytes = 2 * keys * config.num_kv_heads * key_bytes
        flops = 4 * pairs * config.num_heads * config.head_dim
        total += max(size_bytes / ceilings.copy_bytes_s, flops / ceilings.matmul_flop_s)
    return total


def _drawn(rows: Sequence[Row]) -> int:
    return sum(row.draw is not None for row in rows)


def num_keys(new: int, cached: int, window: int | None) -> int:
    """Keys that `new` tokens behind `cached` ones see, together."""
    return new + cached if window is None else new + min(cached, window - 1)


def num_pairs(new: int, cached: int, window: int | None) -> int:
    """Pairs of a token and a key that it sees, itself among them."""

    def up_to(length: int) -> int:
        full = length if window is None else min(length, window)
        return full * (full + 1) // 2 + (length - full) * (window or 0)

    return up_to(cached + new) - up_to(cached)


# -- on the GPU


def ceilings(lines: JsonLines) -> Ceilings:
    """Measured and written. Call it before a model fills the memory."""
    measured = Ceilings.measure()
    torch.cuda.empty_cache()
    lines.put("ceilings", **measured.values())
    return measured


def report(lines: JsonLines, queue: Queue, cells: Sequence[Profiled]) -> None:
    """One JSON line a cell. Call it last: what the profiler hooks may stay slower."""
    passes = recorded(queue, [cell.run for cell in cells for _ in range(PASSES)])
    if len(passes) != PASSES * len(cells):
        raise RuntimeError(f"{PASSES * len(cells)} passes ran, the trace has {len(passes)}")
    for index, cell in enumerate(cells):
        of_cell = passes[index * PASSES : (index + 1) * PASSES]
        listed = {"launches": launches(middle_pass(of_cell))} if cell.launches else {}
        lines.write(**cell.values, **summary(of_cell, cell.timed_ms, cell.floors_s), **listed)


def recorded(queue: Queue, runs: Sequence[Callable[[], object]]) -> list[list[Interval]]:
    """What the GPU did in each run. Launches in graphs count one by one."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for run in runs:
            queue.enqueue(partial(torch.cuda._sleep, WAIT_CYCLES))
            run()
            queue.mark().wait()
    return passes_of(
        Interval(event.name, round(event.time_range.start * 1e3), round(event.time_range.end * 1e3))
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
