"""Tiles for products with 4-bit weights: times those that fit each shape, beside bf16 and dequantising first.

One JSON line a result on standard output, and appended to FILE. PARTs: `gluon` and `portable` (tiles of one kernel for
each number of rows), `bf16` (its kernel), `many_rows` (the portable kernel against dequantising first). A time is the
median of replays of a CUDA graph of several calls, each with weights of its own, together larger than the L2 cache;
kernels are compiled before, in several processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import bare_parser
from baton.kernels import GroupedLinear
from baton.kernels.linear.grouped import block_size
from baton.kernels.triton import linear_policy
from baton.kernels.triton.activation import silu_and_mul
from baton.kernels.triton.compiling import compile_all, launched_by, missing
from baton.kernels.triton.dequantise import dequantise_groups
from baton.kernels.triton.int4_policy import stages_that_fit
from baton.kernels.triton.linear import linear
from baton.kernels.triton.linear_int4 import linear_int4
from baton.kernels.triton.linear_int4_gluon import linear_int4_gluon
from baton.kernels.triton.linear_policy import ProductShape, Tiles

ROTATED_BYTES = 300 << 20
SHAPES = {
    "8b": {
        "qkv": ProductShape(6144, 4096),
        "o": ProductShape(4096, 4096),
        "gate_up": ProductShape(14336, 4096, fused=True),
        "down": ProductShape(4096, 14336),
    },
    "70b": {
        "qkv": ProductShape(10240, 8192),
        "o": ProductShape(8192, 8192),
        "gate_up": ProductShape(28672, 8192, fused=True),
        "down": ProductShape(8192, 28672),
    },
}
SHARED_BYTES = 227 * 1024
PROGRAMS = 100, 1100


def random_weight(shape: ProductShape, group: int, with_zeros: bool) -> GroupedLinear:
    n, k = shape.outputs * (2 if shape.fused else 1), shape.inputs
    words = torch.randint(-(1 << 15), 1 << 15, (n, k // 4), dtype=torch.int16, device=GPU)
    zeros = torch.randint(0, 17, (k // group, n), dtype=torch.int8, device=GPU) if with_zeros else None
    block = block_size(k, group)
    assert block is not None
    return GroupedLinear(words, (torch.rand(k // group, n, device=GPU) / 300).half(), zeros, block)


def candidates(shape: ProductShape, tile_m: int, block: int) -> list[Tiles]:
    """Tiles that divide the shape, fit in shared memory, and give each multiprocessor something to do."""
    found = []
    for tile_n, warps in ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8)):
        for splits in (1,) if shape.fused else (1, 2, 4, 7):
            for stages in (3, 4, 6):
                programs = shape.outputs // tile_n * splits
                stage_bytes = tile_n * block // 2 * (2 if shape.fused else 1) + tile_m * block * 2
                if (
                    (tile_n * 2 >= warps * 32 or tile_m >= 64)
                    and shape.inputs % (splits * block) == 0
                    and shape.inputs // (splits * block) >= stages - 1
                    and PROGRAMS[0] <= programs <= PROGRAMS[1]
                    and stages * stage_bytes + 8 * 1024 < SHARED_BYTES
                    and tile_n * tile_m * (2 if shape.fused else 1) <= 64 * 128 * warps // 4
                ):
                    found.append(Tiles(tile_n, block, tile_m, stages, splits, warps))
    return found


def gluon_candidates(shape: ProductShape, tile_m: int, block: int) -> list[Tiles]:
    """Tiles of linear_int4_gluon, with as many stages as fit."""
    tile_n, found = 64 if shape.fused else 128, []
    for warps in (8, 12) if tile_m <= 16 else (8,):
        stages = stages_that_fit(block, tile_m, warps)
        for splits in (1,) if shape.fused else (1, 2, 4, 7, 8):
            units = shape.outputs // tile_n * splits
            if shape.inputs % (splits * block) == 0 and 90 <= units <= 800:
                found.append(Tiles(tile_n, block, tile_m, stages, splits, warps))
    return found


class Int4Tuner:
    """Times one shape's products with weights of one kind."""

    def __init__(self, lines: JsonLines, name: str, shape: ProductShape, group: int, with_zeros: bool) -> None:
        self._line = partial(lines.write, name=name, n=shape.outputs, k=shape.inputs, group=group, zeros=with_zeros)
        self.shape = shape
        first = random_weight(shape, group, with_zeros)
        self._weights = [first]
        while len(self._weights) * first.size_bytes < ROTATED_BYTES or len(self._weights) < 3:
            self._weights.append(random_weight(shape, group, with_zeros))
        self.block = first.block
        self._sms = torch.cuda.get_device_properties(0).multi_processor_count

    def calls(self, rows: int, tiles: Tiles, by_gluon: bool, count: int | None = None) -> list[Call]:
        x, n, fused = randn(rows, self.shape.inputs), self.shape.outputs, self.shape.fused
        split = tiles.splits > 1
        out = torch.empty((tiles.splits, rows, n), dtype=torch.float32, device=GPU) if split else randn(rows, n)
        weights = self._weights[:count]
        if by_gluon:
            return [partial(linear_int4_gluon, x, w, tiles, self._sms, out, fused=fused, pdl=True) for w in weights]
        return [partial(linear_int4, x, w, tiles, out, fused=fused, pdl=True) for w in weights]

    def report(self, rows: int, tiles: Tiles, by_gluon: bool) -> float:
        """Seconds; infinite if the tiles do not run."""
        try:
            took = seconds(self.calls(rows, tiles, by_gluon))
        except Exception as error:  # too much shared memory, or too many registers
            self._line(rows=rows, tiles=str(tiles), error=str(error)[:200])
            return float("inf")
        size = self._weights[0].size_bytes
        fields = [tiles.tile_n, tiles.tile_k, tiles.tile_m, tiles.stages, tiles.splits, tiles.warps, tiles.prefetch]
        by = "gluon" if by_gluon else "portable"
        self._line(rows=rows, by=by, tiles=fields, us=round(took * 1e6, 2), tb_s=round(size / took / 1e12, 3))
        return took

    def beside_bf16(self, rows: int) -> None:
        tiles = linear_policy.fastest(rows, self.shape)
        n, k, fused = self.shape.outputs, self.shape.inputs, self.shape.fused
        wide = n * (2 if fused else 1)
        weights = [randn(wide, k) for _ in range(max(3, ROTATED_BYTES // (wide * k * 2)))]
        x, plain, out = randn(rows, k), randn(rows, wide), randn(rows, n)
        if tiles is None:
            took = seconds([partial(_by_cublas, x, w, plain, out, fused) for w in weights])
        else:
            parts = out if tiles.splits == 1 else randn(tiles.splits, rows, n, dtype=torch.float32)
            took = seconds([partial(linear, x, w, None, tiles, parts, fused=fused, pdl=True) for w in weights])
        self._line(rows=rows, by="bf16", us=round(took * 1e6, 2), tb_s=round(wide * k * 2 / took / 1e12, 3))

    def dequantised_first(self, rows: int, dequantise: bool) -> None:
        n, k, fused = self.shape.outputs, self.shape.inputs, self.shape.fused
        wide = n * (2 if fused else 1)
        x, plain, out, scratch = randn(rows, k), randn(rows, wide), randn(rows, n), randn(wide, k)

        def call(weight: GroupedLinear) -> None:
            if dequantise:
                _dequantise(weight, scratch)
            _by_cublas(x, scratch, plain, out, fused)

        took = seconds([partial(call, weight) for weight in self._weights[:4]], replays=5)
        by = "dequantised first" if dequantise else "cublas"
        self._line(rows=rows, by=by, us=round(took * 1e6, 2), tflop_s=round(2e-12 * rows * wide * k / took, 1))

    def dequantise(self) -> None:
        scratch = randn(self._weights[0].num_outputs, self.shape.inputs)
        took = seconds([partial(_dequantise, weight, scratch) for weight in self._weights])
        size = self._weights[0].size_bytes + scratch.nbytes
        self._line(by="dequantise", us=round(took * 1e6, 2), tb_s=round(size / took / 1e12, 3))


def _dequantise(weight: GroupedLinear, out: torch.Tensor) -> None:
    dequantise_groups(weight.words, weight.scales, weight.zeros, weight.order, weight.block, out)


def _by_cublas(x: torch.Tensor, weight: torch.Tensor, plain: torch.Tensor, out: torch.Tensor, fused: bool) -> None:
    torch.mm(x, weight.t(), out=plain)
    if fused:
        silu_and_mul(plain, out)


Wanted = tuple[Int4Tuner, int, Tiles, bool]
"""A tuner, a number of rows, tiles, and whether for the kernel in Gluon."""


def compile_in_parallel(wanted: Sequence[Wanted]) -> None:
    def run() -> None:
        for tuner, rows, tiles, by_gluon in wanted:
            tuner.calls(rows, tiles, by_gluon, 1)[0]()

    kernels = launched_by(run)
    if missing(kernels):
        compile_all(kernels, processes=max(1, (os.cpu_count() or 1) - 1), timeout_s=90.0)


def measure(wanted: Sequence[Wanted]) -> None:
    compile_in_parallel(wanted)
    for tuner, rows, tiles, by_gluon in wanted:
        tuner.report(rows, tiles, by_gluon)


def gluon(tuners: Sequence[Int4Tuner]) -> None:
    measure(
        [
            (tuner, rows, tiles, True)
            for tuner in tuners
            for tile_m, measured in {8: (1, 8, 16), 16: (16,), 32: (32,), 64: (64, 128, 192)}.items()
            for rows in measured
            for tiles in gluon_candidates(tuner.shape, tile_m, tuner.block)
        ]
    )


def portable(tuners: Sequence[Int4Tuner]) -> None:
    measure(
        [
            (tuner, rows, replace(tiles, prefetch=columns), False)
            for tuner in tuners
            for tile_m, measured in {16: (1, 16), 32: (32,), 64: (64,), 128: (128,)}.items()
            for rows in measured
            for tiles in candidates(tuner.shape, tile_m, tuner.block)
            for columns in (0, 1024)
        ]
    )


def bf16(tuners: Sequence[Int4Tuner]) -> None:
    for tuner in tuners:
        for rows in (1, 16, 32, 64, 128):
            tuner.beside_bf16(rows)


def many_rows(tuners: Sequence[Int4Tuner]) -> None:
    measure(
        [
            (tuner, rows, Tiles(128, tuner.block, tile_m, stages, 1, 8), False)
            for tuner in tuners
            for rows in (192, 256, 512)
            for tile_m, stages in ((64, 3), (128, 2))
            if not (tuner.shape.fused and tile_m == 128)
        ]
    )
    for tuner in tuners:
        tuner.dequantise()
        for rows in (128, 192, 256, 512, 1024, 2048, 8192):
            tuner.dequantised_first(rows, False)
            tuner.dequantised_first(rows, True)


PARTS: dict[str, Callable[[Sequence[Int4Tuner]], None]] = {
    part.__name__: part for part in (gluon, portable, bf16, many_rows)
}


def main(argv: Sequence[str]) -> int:
    parser = bare_parser("int4", __doc__)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="append the lines to this file as well")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", choices=SHAPES, default="8b", help="whose products")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--zeros", action="store_true", help="with zero points")
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART {sorted(unknown)[0]!r}: must be one of {', '.join(PARTS)}")
    lines = JsonLines(options.file)
    torch.manual_seed(0)
    tuners = [
        Int4Tuner(lines, name, shape, options.group, options.zeros) for name, shape in SHAPES[options.model].items()
    ]
    for part in options.parts or PARTS:
        PARTS[part](tuners)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
