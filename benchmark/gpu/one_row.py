"""Times tiles of plain products of one row, for a model's shapes, beside cuBLAS: what the table of one row in
linear_policy is made of. Then decode attention of that model with a softcap and without, in turns.

One JSON line a product on standard output, and appended to FILE: the fastest tiles, and cuBLAS's time (of gate and up
without the activation). Weights are rotated past the L2 cache; a time is the median of replays of a graph. Kernels are
compiled ahead on all cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import bare_parser
from baton.benchmark.harness.shapes import SHAPES
from baton.kernels.triton.compiling import compile_all, launched_by
from baton.kernels.triton.decode_attention import DecodeScratch, decode_attention
from baton.kernels.triton.decode_plan import split_plan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.linear import linear
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.pool import PagedPool
from baton.models.allocation import allocate
from baton.models.config import ModelConfig
from baton.models.cuda.decoder import dense_part, product_shapes
from baton.models.cuda.products import shape_of
from baton.models.partition import WHOLE

ROTATED_BYTES = 400 << 20  # several times the L2 cache
TILE_NS, TILE_KS, WARPS = (1, 2, 4, 8, 16, 32), (256, 512, 1024, 2048, 4096), (4, 8)
ELEMENTS = range(2048, 16384 + 1)
"""Of a program's piece of the weight: fewer keep too little on its way, more do not fit the registers."""
SOFTCAP, SOFTCAP_CELLS, SOFTCAP_LAYERS = 50.0, ((1, 1024), (8, 1024), (32, 1024), (64, 8192)), 8


def shapes_of(config: ModelConfig) -> tuple[ProductShape, ...]:
    """Of all products but those of experts. Gate and up together, whatever the activation."""
    weights, _ = allocate(config, config.tie_word_embeddings, WHOLE, torch.bfloat16, "meta")
    gates = [mlp.gate_up for layer in weights.layers if (mlp := dense_part(layer.mlp)) is not None]
    shapes = dict.fromkeys((*product_shapes(weights), *(shape_of(each, fused=True) for each in gates)))
    return tuple(shape for shape in shapes if shape.fused or shape not in {shape_of(each) for each in gates})


def tiles_for(shape: ProductShape) -> Iterator[Tiles]:
    for tile_n, tile_k, warps in product(TILE_NS, TILE_KS, WARPS):
        fits = shape.outputs % tile_n == 0 and shape.inputs % tile_k == 0
        if fits and tile_n * tile_k * (2 if shape.fused else 1) in ELEMENTS:
            yield Tiles(tile_n, tile_k, 0, 1, 1, warps)


def calls(shape: ProductShape, tiles: Tiles, weights: Sequence[torch.Tensor], x: torch.Tensor) -> list[Call]:
    out = torch.empty(1, shape.outputs, dtype=x.dtype, device=x.device)
    return [partial(linear, x, weight, None, tiles, out, fused=shape.fused, pdl=True) for weight in weights]


def compile_ahead(shapes: Sequence[ProductShape]) -> None:
    def run() -> None:
        for shape in shapes:
            rows = shape.outputs * (2 if shape.fused else 1)
            weight, x = (torch.empty(size, shape.inputs, dtype=torch.bfloat16, device="meta") for size in (rows, 1))
            for tiles in tiles_for(shape):
                calls(shape, tiles, [weight], x)[0]()

    compile_all(launched_by(run), processes=max(1, (os.cpu_count() or 2) - 1), timeout_s=240.0)


def tune(lines: JsonLines, about: dict[str, object], shape: ProductShape) -> None:
    rows = shape.outputs * (2 if shape.fused else 1)
    size = rows * shape.inputs * 2
    weights = [randn(rows, shape.inputs) for _ in range(max(3, ROTATED_BYTES // size))]
    x, out = randn(1, shape.inputs), randn(1, rows)
    found: list[tuple[float, list[int]]] = []
    for tiles in tiles_for(shape):
        try:
            took = seconds(calls(shape, tiles, weights, x), replays=5)
        except OutOfResources:
            continue
        found.append((took, [tiles.tile_n, tiles.tile_k, tiles.warps]))
    by_cublas = seconds([partial(torch.mm, x, weight.t(), out=out) for weight in weights], replays=5)
    lines.write(
        kernel="one_row", **about, outputs=shape.outputs, inputs=shape.inputs, fused=shape.fused,
        cublas_us=round(by_cublas * 1e6, 2), cublas_tb_s=round(size / by_cublas / 1e12, 3),
        tiles=[{"us": round(took * 1e6, 2), "tb_s": round(size / took / 1e12, 3), "n_k_warps": tiles}
               for took, tiles in sorted(found)[:4]],
    )  # fmt: skip


def softcaps(lines: JsonLines, about: dict[str, object], config: ModelConfig) -> None:
    """Decode attention of the model's heads with and without a softcap, in turns."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for rows, length in SOFTCAP_CELLS:
        width = length // 64
        pool = PagedPool.of(randn(rows * width, kv_heads, SOFTCAP_LAYERS, 2, 64, dim))
        tables = torch.randperm(rows * width, device=GPU).int().view(rows, width)
        lengths = torch.full((rows,), length, dtype=torch.int32, device=GPU)
        query, out, plan = (
            randn(rows, heads, dim),
            randn(rows, heads, dim),
            split_plan(rows, kv_heads, sms, elements=heads // kv_heads * dim),
        )
        scratch = DecodeScratch.make(rows, plan.num_chunks, heads, kv_heads, dim, GPU)
        share_out(lengths, plan, scratch.work)
        took: dict[float | None, list[float]] = {None: [], SOFTCAP: []}
        for softcap in (None, SOFTCAP) * 3:
            each = [
                partial(
                    decode_attention, query, pool, layer, tables, lengths, plan, scratch, out, softcap=softcap, pdl=True
                )
                for layer in range(SOFTCAP_LAYERS)
            ]
            took[softcap].append(seconds(each))
        without, with_cap = min(took[None]), min(took[SOFTCAP])
        lines.write(
            kernel="softcap", **about, rows=rows, length=length, us=round(without * 1e6, 2),
            softcap_us=round(with_cap * 1e6, 2), ratio=round(with_cap / without, 4),
        )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = bare_parser("one-row", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--shapes", default="gemma-2-9b,phi-4", help="folders of benchmark/shapes, comma separated")
    options = parser.parse_args(argv)
    lines = JsonLines(options.file)
    torch.manual_seed(0)
    configs = {name: ModelConfig.from_folder(SHAPES / name) for name in options.shapes.split(",")}
    compile_ahead([shape for config in configs.values() for shape in shapes_of(config)])
    for name, config in configs.items():
        for shape in shapes_of(config):
            tune(lines, {"shape": name}, shape)
        if config.latent is None:
            softcaps(lines, {"shape": name}, config)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
