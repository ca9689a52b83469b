"""Times tiles of products whose weights are bytes, and cuBLAS's of many rows: what linear_policy's tables are made of.

One JSON line a time on standard output, and appended to FILE; `error` is that of the fastest tiles against float64.
Weights are rotated past the L2 cache, and a time is the median of replays of a graph, as in `kernels`. Kernels are
compiled ahead on all cores. x is in codes with scales of rows, or of runs of 128 inputs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import bare_parser
from baton.kernels.triton.compiling import compile_all, launched_by
from baton.kernels.triton.linear_8bit import BLOCK, linear_8bit
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.quantise import RUN, CodedRows

ROTATED_BYTES = 400 << 20  # several times the L2 cache
SHARED_BYTES = 226 << 10
FP8 = torch.float8_e4m3fn
SHAPES = {
    "qkv_8b": ProductShape(6144, 4096),
    "o_8b": ProductShape(4096, 4096),
    "gate_up_8b": ProductShape(14336, 4096, fused=True),
    "down_8b": ProductShape(4096, 14336),
    "gate_up_plain_8b": ProductShape(28672, 4096),
    "qkv_70b": ProductShape(10240, 8192),
    "o_70b": ProductShape(8192, 8192),
    "gate_up_70b": ProductShape(28672, 8192, fused=True),
    "down_70b": ProductShape(8192, 28672),
    "wide": ProductShape(7168, 16384),
}
FORMATS = ("fp8_row", "fp8_block", "int8_row")


@dataclass(frozen=True, slots=True)
class Cell:
    """A product whose tiles are looked for."""

    name: str
    weight_format: str
    rows: int
    x: str
    """row or runs"""

    @property
    def shape(self) -> ProductShape:
        return SHAPES[self.name]

    @property
    def code_type(self) -> torch.dtype:
        return torch.int8 if self.weight_format == "int8_row" else FP8

    @property
    def about(self) -> dict[str, object]:
        return {"name": self.name, "format": self.weight_format, "rows": self.rows, "x": self.x}

    def exists(self) -> bool:
        return self.x == "runs" or self.weight_format != "fp8_block"

    def tiles(self) -> Iterator[Tiles]:
        """Those that fit, with as many stages as leave room for 1 to 4 programs a multiprocessor."""
        n, k, fused = self.shape.outputs, self.shape.inputs, self.shape.fused
        tile_m = next((size for size in (16, 32, 64, 128) if self.rows <= size), 256)
        for tile_n, tile_k, splits in product((64, 128), (128, 256), (1, 2, 4)):
            programs = n // tile_n * splits
            if (fused and splits > 1) or k % (tile_k * splits) or not 112 <= programs <= 700 * (1 + fused):
                continue
            stage = tile_n * tile_k * (2 if fused else 1) + tile_m * tile_k
            steps = k // splits // tile_k
            room = [SHARED_BYTES // count - 4096 for count in (1, 2, 3, 4)]
            for stages in sorted({min(size // stage, steps, 12) for size in room}):
                if stages >= 3:
                    yield Tiles(tile_n, tile_k, tile_m, stages, splits, 8 if tile_n == 128 and tile_m >= 64 else 4)


@dataclass(slots=True)
class Operands:
    """Of one cell: several weights, one x, and where results go."""

    x: CodedRows
    weights: list[tuple[torch.Tensor, torch.Tensor]]
    out: torch.Tensor
    """Of the call that ran last."""

    @classmethod
    def make(cls, cell: Cell, count: int, device: str = GPU) -> Operands:
        n, k = cell.shape.outputs * (2 if cell.shape.fused else 1), cell.shape.inputs
        scales = (n // BLOCK, k // BLOCK) if cell.weight_format == "fp8_block" else (n,)
        weights = [(_codes(n, k, cell.code_type, device), _scales(scales, k, device)) for _ in range(count)]
        of_x = (k // RUN, -(-cell.rows // 4) * 4) if cell.x == "runs" else (cell.rows,)
        x = CodedRows(_codes(cell.rows, k, cell.code_type, device), _scales(of_x, 1, device))
        return cls(x, weights, torch.empty(0, device=device))

    def calls(self, cell: Cell, tiles: Tiles) -> list[Call]:
        shape = (cell.rows, cell.shape.outputs)
        self.out = torch.empty(
            shape if tiles.splits == 1 else (tiles.splits, *shape),
            dtype=torch.bfloat16 if tiles.splits == 1 else torch.float32,
            device=self.out.device,
        )
        multiply = partial(linear_8bit, fused=cell.shape.fused, pdl=True)
        return [partial(multiply, self.x, codes, scales, None, tiles, self.out) for codes, scales in self.weights]

    def error(self, cell: Cell, call: Call) -> float:
        """Of the first weight's product, relative to its norm."""
        call()
        codes, scales = self.weights[0]
        wide = _spread(scales, codes) * codes.double()
        x, of_x = self.x.codes.double(), self.x.scales.double()
        x *= of_x.t()[: len(x)].repeat_interleave(RUN, 1) if of_x.dim() == 2 else of_x[:, None]
        exact = x @ wide.t()
        if cell.shape.fused:
            gate, up = exact.chunk(2, -1)
            exact = torch.nn.functional.silu(gate) * up
        found = self.out.double().sum(0) if self.out.dim() == 3 else self.out.double()
        return float((found - exact).norm() / exact.norm())


def _codes(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    if device == "meta":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    values = torch.empty(rows, columns, device=device).normal_()
    return (values * (40 if dtype == torch.int8 else 100)).clamp_(-127, 127).to(dtype)


def _scales(shape: tuple[int, ...], k: int, device: str) -> torch.Tensor:
    empty = torch.empty(shape, device=device)
    return empty if device == "meta" else empty.uniform_(0.5, 1.5).mul_(0.01 * k**-0.5)


def _spread(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    if scales.dim() == 1:
        return scales[:, None].double()
    return scales.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def compile_ahead(cells: Sequence[Cell]) -> int:
    def run() -> None:
        for cell in cells:
            operands = Operands.make(cell, 1, "meta")
            for tiles in cell.tiles():
                operands.calls(cell, tiles)[0]()

    kernels = launched_by(run)
    compile_all(kernels, processes=max(1, (os.cpu_count() or 2) - 1), timeout_s=240.0)
    return len(kernels)


def tune(lines: JsonLines, cell: Cell) -> None:
    size = cell.shape.outputs * (2 if cell.shape.fused else 1) * cell.shape.inputs
    operands = Operands.make(cell, max(3, ROTATED_BYTES // size))
    found: list[tuple[float, Tiles]] = []
    for tiles in cell.tiles():
        try:
            found.append((seconds(operands.calls(cell, tiles), replays=5), tiles))
        except OutOfResources:
            continue
    found.sort(key=lambda each: each[0])
    for took, tiles in found[:6]:
        lines.write(
            kernel="tiles",
            **cell.about,
            us=round(took * 1e6, 2),
            tb_s=round(size / took / 1e12, 3),
            tiles=_listed(tiles),
        )
    if found:
        error = operands.error(cell, operands.calls(cell, found[0][1])[0])
        lines.write(
            kernel="error", **cell.about, tiles=_listed(found[0][1]), tried=len(found), error=float(f"{error:.3g}")
        )


def _listed(tiles: Tiles) -> list[int]:
    return [tiles.tile_n, tiles.tile_k, tiles.tile_m, tiles.stages, tiles.splits, tiles.warps]


def many_rows(lines: JsonLines, name: str) -> None:
    """cuBLAS's products: of bfloat16, and of FP8 and INT8 with scales of rows or blocks."""
    shape = SHAPES[name]
    n, k = shape.outputs * (2 if shape.fused else 1), shape.inputs
    weight, codes, integers = randn(n, k), _codes(n, k, FP8, GPU), _codes(n, k, torch.int8, GPU)
    of_outputs, of_blocks = _scales((1, n), k, GPU), _scales((n // BLOCK, k // BLOCK), k, GPU)
    for rows in (64, 128, 256, 512, 1024, 2048, 4096):
        x, bytes_, int_x = randn(rows, k), _codes(rows, k, FP8, GPU), _codes(rows, k, torch.int8, GPU)
        of_rows, of_chunks = _scales((rows, 1), 1, GPU), _scales((k // BLOCK, rows), 1, GPU)
        plain, whole = randn(rows, n), torch.empty(rows, n, dtype=torch.int32, device=GPU)
        by_row = partial(torch._scaled_mm, bytes_, codes.t(), of_rows, of_outputs, out_dtype=torch.bfloat16)
        ways: dict[str, Call] = {
            "bf16": partial(torch.mm, x, weight.t(), out=plain),
            "row": partial(by_row, use_fast_accum=False),
            "row_fast": partial(by_row, use_fast_accum=True),
            "block": partial(
                torch._scaled_mm, bytes_, codes.t(), of_chunks.t(), of_blocks.t(), out_dtype=torch.bfloat16
            ),
            "int": partial(torch._int_mm, int_x, integers.t(), out=whole),
        }
        for way, call in ways.items():
            try:
                took = seconds([call] * 4, replays=5)
            except RuntimeError as failure:
                lines.write(kernel="cublas", name=name, rows=rows, way=way, failed=str(failure)[:300])
                continue
            lines.write(
                kernel="cublas", name=name, rows=rows, way=way, us=round(took * 1e6, 1),
                tflop_s=round(2 * rows * n * k / took / 1e12, 1),
            )  # fmt: skip
    exact = (bytes_.double() * of_rows) @ (codes.double() * of_outputs.t()).t()
    for fast in (False, True):
        error = float((by_row(use_fast_accum=fast).double() - exact).norm() / exact.norm())
        lines.write(kernel="error", name=name, rows=rows, way=f"row {fast}", error=float(f"{error:.3g}"))


def main(argv: Sequence[str]) -> int:
    parser = bare_parser("tune", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--shapes", default="qkv_8b,o_8b,gate_up_8b,down_8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="FORMATS", help=", ".join(FORMATS))
    parser.add_argument("--rows", default="1,16,32,64,128", metavar="ROWS")
    parser.add_argument("--x", default="row,runs", metavar="FORMS", help="of x")
    parser.add_argument("--many", default="", metavar="SHAPES", help="whose products of many rows are timed")
    options = parser.parse_args(argv)
    lines = JsonLines(options.file)
    torch.manual_seed(0)
    cells = [
        cell
        for name in filter(None, options.shapes.split(","))
        for weight_format in options.formats.split(",")
        for rows in map(int, options.rows.split(","))
        for form in options.x.split(",")
        if (cell := Cell(name, weight_format, rows, form)).exists()
    ]
    if cells:
        _timed(lines, "compiled", lambda: compile_ahead(cells))
    for cell in cells:
        tune(lines, cell)
    for name in filter(None, options.many.split(",")):
        many_rows(lines, name)
    return 0


def _timed(lines: JsonLines, what: str, run: Callable[[], int]) -> None:
    began_at = time.monotonic()
    count = run()
    lines.write(kernel=what, count=count, seconds=round(time.monotonic() - began_at, 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
