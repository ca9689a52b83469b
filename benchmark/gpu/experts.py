"""Times the kernels of experts on the GPU at hand: routing, products of few rows and of prompts, and their sum.

One JSON line a result on standard output, and appended to FILE. PARTs: `few` (bytes of the experts that were chosen, a
second; routing and a whole block as a decode step launches them), `prompts` (operations a second), `tune` (tiles for
few rows), `one_token` (tiles for one token and experts of FP8).

Weights are random and the tokens' choices too, evenly and with a few experts that most tokens choose (`--skew`). A
time is the median of replays of a CUDA graph of several calls, each with choices of its own, so that they are together
larger than the L2 cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import bare_parser
from baton.kernels.routing import Routing
from baton.kernels.triton import experts_policy, norm, route
from baton.kernels.triton.compiling import compile_all, launched_by, missing
from baton.kernels.triton.experts import experts
from baton.kernels.triton.experts_8bit import experts_8bit
from baton.kernels.triton.experts_8bit_row import experts_8bit_row
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.quantise import RUN, CodedRows, quantise
from baton.kernels.triton.route import Routes
from baton.kernels.triton.routed_sum import RoutedSum
from baton.kernels.triton.spread import spread

CALLS = 12
"""Choices that take turns."""
FP8 = torch.float8_e4m3fn
FEW_TOKENS, PROMPT_TOKENS = (1, 2, 8, 16, 32, 64, 128, 256), (256, 512, 1024, 2048, 8192)
SPLITS = 8
SKEWS = (0.0, 1.0)


class ExpertsShape(NamedTuple):
    hidden: int
    width: int
    routing: Routing


SHAPES = {
    "qwen3-30b-a3b": ExpertsShape(2048, 768, Routing(128, 8)),
    "mixtral-8x7b": ExpertsShape(4096, 14336, Routing(8, 2)),
    "deepseek-v2-lite": ExpertsShape(2048, 1408, Routing(64, 6)),
}


@dataclass(frozen=True, slots=True)
class RandomExperts:
    """Of one layer."""

    router: torch.Tensor  # [E, hidden]
    gate_up: torch.Tensor  # [E, 2 width, hidden]
    down: torch.Tensor  # [E, hidden, width]

    @classmethod
    def make(cls, shape: ExpertsShape) -> RandomExperts:
        e = shape.routing.num_experts
        return cls(
            randn(e, shape.hidden).mul_(0.02),
            randn(e, 2 * shape.width, shape.hidden).mul_(shape.hidden**-0.5),
            randn(e, shape.hidden, shape.width).mul_(shape.width**-0.5),
        )


class ExpertsBench:
    """One shape's block of experts."""

    def __init__(self, lines: JsonLines, name: str, weights: RandomExperts, skew: float) -> None:
        self.shape, self.weights = SHAPES[name], weights
        self.line = partial(lines.write, model=name, skew=skew)
        self._skew = skew
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def routes(self, tokens: int, tile_m: int, count: int = CALLS) -> list[Routes]:
        """Of random logits."""
        routing, made = self.shape.routing, []
        for _ in range(count):
            logits = torch.randn(1, tokens, routing.num_experts, device=GPU)
            logits -= self._skew * torch.arange(routing.num_experts, device=GPU).log1p()
            made.append(Routes.make(tokens, routing, tile_m, GPU))
            route.choose(logits, routing, None, None, range(routing.num_experts), made[-1])
        return made

    def chosen(self, routes: Sequence[Routes]) -> float:
        """Experts that some token chose, on average."""
        found = [len(torch.unique(each.experts[: int(each.num_tiles)])) for each in routes]
        return sum(found) / len(found)

    def product(self, fused: bool) -> ProductShape:
        hidden, width = self.shape.hidden, self.shape.width
        return ProductShape(width, hidden, True) if fused else ProductShape(hidden, width)

    def calls(self, tokens: int, tiles: Tiles, fused: bool, routes: Sequence[Routes]) -> list[Call]:
        n, k, _, _ = self.product(fused)
        rows = len(routes[0].tokens)
        x, out = randn(tokens if fused else rows, k), randn(rows, n)
        weight = self.weights.gate_up if fused else self.weights.down
        return [partial(experts, x, weight, of, tiles, out, fused=fused, gathered=fused, pdl=True) for of in routes]

    def calls_8bit(
        self, tokens: int, tiles: Tiles, fused: bool, blocked: bool, routes: Sequence[Routes], codes: torch.Tensor
    ) -> list[Call]:
        n, k, _, _ = self.product(fused)
        rows, (e, outputs, _) = len(routes[0].tokens), codes.shape
        scales = torch.rand(*((e * outputs // 128, k // 128) if blocked else (e * outputs,)), device=GPU) / 448
        given = tokens if fused else rows
        x = CodedRows(
            torch.zeros(given, k, dtype=FP8, device=GPU),
            torch.zeros(*((k // RUN, given) if blocked or not fused else (given,)), device=GPU),
        )
        out: torch.Tensor | CodedRows = randn(rows, n)
        if fused:
            out = CodedRows(torch.zeros(rows, n, dtype=FP8, device=GPU), torch.zeros(n // RUN, rows, device=GPU))
        return [
            partial(experts_8bit, x, codes, scales, of, tiles, out, fused=fused, gathered=fused, pdl=True)
            for of in routes
        ]

    def calls_8bit_row(
        self, tiles: Tiles, fused: bool, blocked: bool, routes: Sequence[Routes], codes: torch.Tensor
    ) -> list[Call]:
        """Of one token."""
        (e, outputs, k), n = codes.shape, self.product(fused).outputs
        scales = torch.rand(*((e * outputs // 128, k // 128) if blocked else (e * outputs,)), device=GPU) / 448
        x, out = randn(1 if fused else len(routes[0].tokens), k), randn(len(routes[0].tokens), n)
        options = {"fused": fused, "gathered": fused, "pdl": True}
        return [partial(experts_8bit_row, x, codes, scales, of, tiles, out, **options) for of in routes]


def few(bench: ExpertsBench) -> None:
    e = bench.shape.routing.num_experts
    for tokens in FEW_TOKENS:
        tile_m = experts_policy.tile_rows(tokens, e, bench.shape.routing.top_k)
        for one in (True, False) if tokens == 1 else (False,):
            routes = bench.routes(tokens, 1 if one else tile_m)
            chosen, calls = bench.chosen(routes), []
            for fused in (True, False):
                shape = bench.product(fused)
                tiles = (
                    experts_policy.row_tiles(shape)
                    if one
                    else experts_policy.rows_tiles(shape, tile_m, routes[0].most_tiles, 2)
                )
                assert tiles is not None, "the shapes here have tiles"
                calls.append(bench.calls(tokens, tiles, fused, routes))
                took = seconds(calls[-1])
                size = chosen * shape.outputs * shape.inputs * 2 * (2 if fused else 1)
                bench.line(
                    kernel="gate_up" if fused else "down", tokens=tokens, us=took * 1e6, tb_s=size / took / 1e12,
                    chosen=chosen, tiles=str(tiles),
                )  # fmt: skip
            _block(bench, tokens, routes, calls, chosen)
    _few_8bit(bench)


def _block(
    bench: ExpertsBench, tokens: int, routes: Sequence[Routes], calls: Sequence[Sequence[Call]], chosen: float
) -> None:
    """Routing alone, and a whole block with the norm behind it."""
    routing, hidden = bench.shape.routing, bench.shape.hidden
    x, weight, held = randn(tokens, hidden), randn(hidden), range(routing.num_experts)
    y, residual = randn(len(routes[0].tokens), hidden), randn(tokens, hidden)
    logits = torch.zeros(SPLITS, tokens, routing.num_experts, device=GPU)
    scratch = Routes.make(tokens, routing, routes[0].tile_m, GPU)
    routers = [bench.weights.router.clone() for _ in routes]
    multiply = [partial(route.router, x, each, None, logits, pdl=True) for each in routers]
    choose = partial(route.choose, logits, routing, None, None, held, scratch, pdl=True)
    sums = [partial(norm.add_rms_norm, RoutedSum(y, of, None), residual, weight, 1e-5, x, pdl=True) for of in routes]

    def in_turns(*kinds: Sequence[Call]) -> float:
        def call(number: int) -> None:
            for kind in kinds:
                kind[number]()

        return seconds([partial(call, number) for number in range(len(routes))]) * 1e6

    many = [choose] * len(routes)
    bench.line(kernel="router", tokens=tokens, us=in_turns(multiply))
    bench.line(kernel="choose", tokens=tokens, us=in_turns(many))
    bench.line(kernel="routing", tokens=tokens, us=in_turns(multiply, many))
    bench.line(kernel="sum_and_norm", tokens=tokens, us=in_turns(sums))
    us = in_turns(multiply, many, calls[0], calls[1], sums)
    size = chosen * (bench.weights.gate_up[0].nbytes + bench.weights.down[0].nbytes)
    bench.line(kernel="block", tokens=tokens, us=us, tb_s=size / us / 1e6)


def _few_8bit(bench: ExpertsBench) -> None:
    codes = {True: bench.weights.gate_up.to(FP8), False: bench.weights.down.to(FP8)}
    for tokens in FEW_TOKENS:
        tile_m = experts_policy.tile_rows(tokens, bench.shape.routing.num_experts, bench.shape.routing.top_k)
        routes = bench.routes(tokens, 1 if tokens == 1 else tile_m)
        chosen = bench.chosen(routes)
        for fused in (True, False):
            for blocked in (False, True):
                shape = bench.product(fused)
                if tokens == 1:
                    tiles = experts_policy.row_tiles_8bit(shape, blocked)
                    calls = bench.calls_8bit_row(tiles, fused, blocked, routes, codes[fused])
                else:
                    by_rule = experts_policy.rows_tiles_8bit(shape, tile_m, routes[0].most_tiles)
                    assert by_rule is not None, "the shapes here have tiles"
                    tiles = by_rule
                    calls = bench.calls_8bit(tokens, tiles, fused, blocked, routes, codes[fused])
                took = seconds(calls)
                size = chosen * codes[fused][0].nbytes
                bench.line(
                    kernel="gate_up" if fused else "down", format="fp8_block" if blocked else "fp8_row",
                    tokens=tokens, us=took * 1e6, tb_s=size / took / 1e12, chosen=chosen, tiles=str(tiles),
                )  # fmt: skip
        x = randn(tokens, bench.shape.hidden)
        out = CodedRows(torch.zeros(tokens, bench.shape.hidden, dtype=FP8, device=GPU), torch.zeros(tokens, device=GPU))
        bench.line(kernel="quantise", tokens=tokens, us=seconds([partial(quantise, x, out, pdl=True)] * CALLS) * 1e6)


def one_token(bench: ExpertsBench) -> None:
    codes = {True: bench.weights.gate_up.to(FP8), False: bench.weights.down.to(FP8)}
    for blocked in (False, True):
        found, named = {}, {"format": "fp8_block" if blocked else "fp8_row", "tokens": 1}
        routes = bench.routes(1, 1)
        size = bench.chosen(routes) * (codes[True][0].nbytes + codes[False][0].nbytes)
        for fused in (True, False):
            timed, shape = [], bench.product(fused)
            by_policy = experts_policy.row_tiles_8bit(shape, blocked)
            for tiles in dict.fromkeys((by_policy, *_row_candidates_8bit(shape))):
                timed.append((seconds(bench.calls_8bit_row(tiles, fused, blocked, routes, codes[fused])), tiles))
                fields = [tiles.tile_n, tiles.tile_k, tiles.stages, tiles.warps, tiles.prefetch]
                kernel = "gate_up" if fused else "down"
                bench.line(kernel=kernel, tiles=fields, **named, us=timed[-1][0] * 1e6, policy=tiles == by_policy)
            best = min(timed, key=lambda each: each[0])[1]
            found[fused] = {"policy": by_policy, "best": best}
        for _, by in product(range(3), ("policy", "best")):
            each = [bench.calls_8bit_row(found[f][by], f, blocked, routes, codes[f]) for f in (True, False)]
            took = _together(each)
            bench.line(kernel="both", by=by, **named, us=took * 1e6, tb_s=size / took / 1e12)


def _together(kinds: Sequence[Sequence[Call]]) -> float:
    """Seconds of a call of each kind, which follow one another."""
    return seconds([call for turn in zip(*kinds, strict=True) for call in turn]) * len(kinds)


def _row_candidates_8bit(shape: ProductShape) -> list[Tiles]:
    return [
        Tiles(size // tile_k, tile_k, 0, 4, 1, 4, prefetch)
        for size, tile_k in product((2048, 4096, 8192), (256, 512, 1024))
        for prefetch in ((0,) if shape.fused else (0, 512))
        if shape.inputs % tile_k == 0 and shape.outputs % (size // tile_k) == 0 and prefetch <= shape.inputs
    ]


def prompts(bench: ExpertsBench) -> None:
    from baton.kernels.triton import experts_gluon

    routing, hidden, width = bench.shape.routing, bench.shape.hidden, bench.shape.width
    for tokens in PROMPT_TOKENS:
        routes = bench.routes(tokens, experts_gluon.TILE_M, 3)
        rows = len(routes[0].tokens)
        x, xs, gated = randn(tokens, hidden), randn(rows, hidden), randn(rows, width)
        residual, weight, out = randn(tokens, hidden), randn(hidden), randn(tokens, hidden)
        logits = torch.zeros(1, tokens, routing.num_experts, device=GPU)
        scratch, held = Routes.make(tokens, routing, experts_gluon.TILE_M, GPU), range(routing.num_experts)
        gate_up = partial(experts_gluon.experts_product, xs, bench.weights.gate_up, gated=True)
        down = partial(experts_gluon.experts_product, gated, bench.weights.down, gated=False)
        operations = 2.0 * tokens * routing.top_k * hidden * width
        kernels: dict[str, tuple[list[Call], float]] = {
            "router": ([partial(route.router, x, bench.weights.router, None, logits)] * 3, 0.0),
            "choose": ([partial(route.choose, logits, routing, None, None, held, scratch)] * 3, 0.0),
            "spread": ([partial(spread, x, of, xs) for of in routes], 0.0),
            "gate_up": ([partial(gate_up, of, bench.num_sms, gated) for of in routes], 2 * operations),
            "down": ([partial(down, of, bench.num_sms, xs) for of in routes], operations),
            "sum_and_norm": (
                [partial(norm.add_rms_norm, RoutedSum(xs, of, None), residual, weight, 1e-5, out) for of in routes],
                0.0,
            ),
        }
        total = 0.0
        for kernel, (calls, done) in kernels.items():
            took = seconds(calls)
            total += took
            rate = {"tflop_s": done / took / 1e12} if done else {}
            bench.line(kernel=kernel, tokens=tokens, by="gluon", us=took * 1e6, **rate)
        bench.line(kernel="block", tokens=tokens, by="gluon", us=total * 1e6, tflop_s=3 * operations / total / 1e12)
        _portable(bench, tokens)


def _portable(bench: ExpertsBench, tokens: int) -> None:
    """The kernel for few rows, with wider tiles of x."""
    routing = bench.shape.routing
    for tile_m, warps in ((32, 4), (64, 4), (128, 8)):
        routes = bench.routes(tokens, tile_m, 3)
        for fused in (True, False):
            tile_n = 64 if fused else 128
            tiles = Tiles(tile_n, 64, tile_m, 4, 1, warps if fused else 8, 0)
            took = seconds(bench.calls(tokens, tiles, fused, routes))
            operations = (4.0 if fused else 2.0) * tokens * routing.top_k * bench.shape.hidden * bench.shape.width
            bench.line(
                kernel="gate_up" if fused else "down", tokens=tokens, by="portable", us=took * 1e6,
                tflop_s=operations / took / 1e12, tiles=str(tiles),
            )  # fmt: skip


def tune(bench: ExpertsBench) -> None:
    wanted = []
    for tokens, tile_m in ((1, 0), (1, 16), (8, 16), (32, 16), (64, 16), (64, 32)):
        routes = bench.routes(tokens, max(tile_m, 1))
        chosen = bench.chosen(routes)
        for fused in (True, False):
            shape = bench.product(fused)
            for tiles in _candidates(shape, tile_m):
                wanted.append((tokens, tiles, fused, routes, chosen, shape))

    def run() -> None:
        for tokens, tiles, fused, routes, _, _ in wanted:
            bench.calls(tokens, tiles, fused, routes[:1])[0]()

    kernels = launched_by(run)
    if missing(kernels):
        compile_all(kernels, processes=max(1, (os.cpu_count() or 1) - 1), timeout_s=120.0)
    for tokens, tiles, fused, routes, chosen, shape in wanted:
        given = {"kernel": "gate_up" if fused else "down", "tokens": tokens, "tune": True}
        fields = [tiles.tile_n, tiles.tile_k, tiles.tile_m, tiles.stages, tiles.warps, tiles.prefetch]
        try:
            took = seconds(bench.calls(tokens, tiles, fused, routes), 5)
        except Exception as error:  # too much shared memory
            bench.line(**given, tiles=fields, error=str(error)[:100])
            continue
        size = chosen * shape.outputs * shape.inputs * 2 * (2 if fused else 1)
        bench.line(**given, tiles=fields, us=took * 1e6, tb_s=size / took / 1e12)


def _candidates(shape: ProductShape, tile_m: int) -> list[Tiles]:
    n, k, fused, _ = shape
    if tile_m == 0:
        found = [
            Tiles(tile_n, tile_k, 0, 1, 1, warps)
            for tile_n in (1, 2, 4, 8, 16, 32)
            for tile_k in (256, 512, 1024, 2048)
            for warps in (4, 8)
            if 2048 <= tile_n * tile_k <= 16384
        ]
    else:
        found = [
            Tiles(tile_n, tile_k, tile_m, stages, 1, warps, 0)
            for tile_n, warps in ((64, 4), (128, 4), (128, 8))
            for tile_k in (64, 128, 256)
            for stages in (2, 3, 4, 6, 8)
            if 40 << 10 <= stages * (tile_n * (2 if fused else 1) + tile_m) * tile_k * 2 <= 220 << 10
        ]
    return [tiles for tiles in found if n % tiles.tile_n == 0 and k % tiles.tile_k == 0]


PARTS: dict[str, Callable[[ExpertsBench], None]] = {part.__name__: part for part in (few, prompts, tune, one_token)}


def main(argv: Sequence[str]) -> int:
    parser = bare_parser("experts", __doc__)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="append the lines to this file as well")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", choices=SHAPES, action="append", help="whose experts; by default all")
    skew_help = "how much more likely the first experts are; 1: Zipf; may be repeated. Default: 0 and 1"
    parser.add_argument("--skew", type=float, action="append", help=skew_help)
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART {sorted(unknown)[0]!r}: must be one of {', '.join(PARTS)}")
    lines = JsonLines(options.file)
    torch.manual_seed(0)
    for name in options.model or SHAPES:
        weights = RandomExperts.make(SHAPES[name])
        for part, skew in product(options.parts or ("few", "prompts"), options.skew or SKEWS):
            PARTS[part](ExpertsBench(lines, name, weights, skew))
        del weights
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
