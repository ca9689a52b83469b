"""Times tiles of quantised products in whole decode steps, and cuBLAS's products of many rows of 8 bits.

Steps are of few layers of a shape, with random weights and KV. For each number of rows, product by product, tiles
take turns while the other products keep the best so far: what a kernel reads before it may begin, and what it leaves in
the L2 cache, shows in a step only. `step` lines: the six fastest of a product, a microsecond being that of a layer;
`chosen`: the best together, beside the policy's. Kernels are compiled ahead on all cores.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.gpu.runners import BLOCK_TOKENS, RandomKv, random_pool
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import bare_parser
from baton.benchmark.harness.shapes import SHAPES
from baton.kernels.triton import int4_policy, linear_8bit_policy
from baton.kernels.triton.compiling import compile_all, launched_by, missing
from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import split_plan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.linear_8bit import BLOCK
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.cuda.decoder import DeviceDecoder
from baton.models.cuda.products import fastest, shape_of
from baton.models.layer_weights import DenseMlpWeights, Weights
from baton.models.weights import load_weights

FP8 = torch.float8_e4m3fn
MANY_SHAPES = {
    "qkv_8b": ProductShape(6144, 4096),
    "o_8b": ProductShape(4096, 4096),
    "gate_up_8b": ProductShape(14336, 4096, fused=True),
    "down_8b": ProductShape(4096, 14336),
}
SPLITS = 1, 2, 4
UNITS = 72, 600
REPLAYS, KEPT = 15, 6
PRODUCTS = "qkv", "o", "gate_up", "down"


@dataclass(slots=True)
class Tried:
    """A policy: what is tried, by shape, and for others the policy of speed."""

    tiles: dict[ProductShape, Tiles] = field(default_factory=dict)

    def __call__(self, num_rows: int, shape: ProductShape) -> Tiles | None:
        return self.tiles.get(shape) or fastest(num_rows, shape)


def candidates(num_rows: int, shape: ProductShape) -> list[Tiles]:
    """Tiles of the kernels in Gluon that divide the shape, in rings of several depths."""
    of_4_bits = shape.weight_format.startswith(int4_policy.PREFIX)
    block = int4_policy.block_of(shape) if of_4_bits else BLOCK
    if not of_4_bits and shape.weight_format not in linear_8bit_policy.FORMATS:
        return []
    sizes = int4_policy.TILE_ROWS if of_4_bits else linear_8bit_policy.TILE_ROWS
    tile_m = next((size for size in sizes if num_rows <= size), sizes[-1])
    tile_n, found = 64 if shape.fused else 128, []
    if not block or shape.outputs % tile_n:
        return []
    if of_4_bits:
        all_warps = (8, 12) if tile_m <= 16 else (8,)
    else:
        all_warps = (4 * linear_8bit_policy.GROUPS[shape.weight_format],)
    for splits in (1,) if shape.fused else SPLITS:
        units = shape.outputs // tile_n * splits
        if shape.inputs % (splits * block) or not UNITS[0] <= units <= UNITS[1]:
            continue
        blocks = -(-units // linear_8bit_policy.PROGRAMS) * (shape.inputs // block // splits)
        for warps in all_warps:
            groups = warps // 4
            if of_4_bits:
                deepest = int4_policy.stages_that_fit(block, tile_m, warps)
            else:
                deepest = linear_8bit_policy.stages_that_fit(tile_m, 1, groups)
            found += [
                Tiles(tile_n, block, tile_m, stages, splits, warps) for stages in _depths(deepest, blocks, groups)
            ]
    return found


def _depths(deepest: int, blocks: int, groups: int) -> list[int]:
    """Stages of rings: as many as fit, or all blocks of a program; and half and a quarter of these."""
    most = min(deepest, -(-blocks // groups) * groups)
    return sorted({max(2, most // part // groups) * groups for part in (1, 2, 4)} & set(range(deepest + 1)))


class Steps:
    """Decode steps of a model by a policy that changes."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        pool: RandomKv,
        max_rows: int,
        context: int,
        products: Sequence[str] = PRODUCTS,
    ) -> None:
        """products: of PRODUCTS, whose tiles are tried."""
        first = weights.layers[0]
        names = {"qkv": first.attention.qkv, "o": first.attention.o}
        if isinstance(first.mlp, DenseMlpWeights):
            names |= {"gate_up": first.mlp.gate_up, "down": first.mlp.down}
        shapes = [shape_of(weights, fused=name == "gate_up") for name, weights in names.items() if name in products]
        self.shapes = [shape for shape in dict.fromkeys(shapes) if candidates(1, shape)]
        self.policy = Tried({shape: max(candidates(1, shape), key=lambda each: each.splits) for shape in self.shapes})
        self._config, self._pool, self._context = config, pool, context
        self._decoder = DeviceDecoder(config, weights, self.policy, max_rows, max_rows, context + 1)
        self._decoder.bind_pool(PagedPool.of(pool.tensors.data, None))
        self.policy.tiles.clear()

    def call(self, num_rows: int) -> Call:
        config, blocks = self._config, -(-self._context // BLOCK_TOKENS)
        inputs = StepInputs.make(num_rows, blocks, GPU)
        tables = torch.randperm(self._pool.num_blocks, device=GPU)[: num_rows * blocks].view(num_rows, blocks)
        inputs.tables.copy_(tables)
        inputs.lengths.fill_(self._context)
        inputs.positions.fill_(self._context - 1)
        inputs.kv_slots.copy_(tables[:, -1] * BLOCK_TOKENS + BLOCK_TOKENS - 1)
        num_sms, part = torch.cuda.get_device_properties(0).multi_processor_count, config.group_size * config.head_dim
        plan = split_plan(num_rows, config.num_kv_heads, num_sms, elements=part)
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        scratch = DecodeScratch.make(num_rows, plan.num_chunks, *heads, GPU)
        share_out(inputs.lengths, plan, scratch.work)
        return partial(self._decoder.decode, inputs, plan, scratch, True)


def try_all(steps: Steps, rows: Sequence[int]) -> None:
    """One step of a number of rows after the other, until each product had all its candidates."""
    calls = {num_rows: steps.call(num_rows) for num_rows in rows}
    for num_rows, call in calls.items():
        listed = {shape: candidates(num_rows, shape) for shape in steps.shapes}
        for number in range(max(map(len, listed.values()))):
            steps.policy.tiles = {shape: each[number % len(each)] for shape, each in listed.items()}
            call()
    steps.policy.tiles = {}
    for call in calls.values():
        call()


def compile_ahead(run: Callable[[], None]) -> int:
    """What `run` would launch, and how many kernels that were."""
    absent = missing(kernels := launched_by(run))
    if absent:
        compile_all(kernels, processes=max(1, (os.cpu_count() or 2) - 1), timeout_s=120.0)
    return len(absent)


def tune(lines: JsonLines, steps: Steps, num_rows: int, about: dict[str, object], layers: int) -> None:
    call, policy = steps.call(num_rows), steps.policy
    best: dict[ProductShape, Tiles] = {}
    for shape in sorted(steps.shapes, key=lambda each: -each.outputs * each.inputs):
        found: list[tuple[float, Tiles]] = []
        for tiles in candidates(num_rows, shape):
            policy.tiles = {**best, shape: tiles}
            try:
                found.append((seconds([call], replays=REPLAYS), tiles))
            except OutOfResources:
                continue
        found.sort(key=lambda each: each[0])
        best[shape] = found[0][1]
        for took, tiles in found[:KEPT]:
            named = {"n": shape.outputs, "k": shape.inputs, "fused": shape.fused}
            lines.write(kernel="step", **about, rows=num_rows, **named, us=_us(took / layers), tiles=_listed(tiles))
    times: dict[str, list[float]] = {"chosen": [], "policy": []}
    for _ in range(3):
        for name, tiles_of in (("chosen", best), ("policy", {})):
            policy.tiles = tiles_of
            times[name].append(seconds([call], replays=REPLAYS))
    policy.tiles = {}
    lines.write(
        kernel="chosen", **about, rows=num_rows, us={name: _us(min(each) / layers) for name, each in times.items()},
        tiles={f"{shape.outputs}x{shape.inputs}": _listed(tiles) for shape, tiles in best.items()},
    )  # fmt: skip


def _us(took: float) -> float:
    return round(took * 1e6, 2)


def _listed(tiles: Tiles) -> list[int]:
    return [tiles.tile_n, tiles.tile_k, tiles.tile_m, tiles.stages, tiles.splits, tiles.warps]


def _codes(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty(rows, columns, device=GPU).normal_()
    return (values * (40 if dtype == torch.int8 else 100)).clamp_(-127, 127).to(dtype)


def _scales(shape: tuple[int, ...], k: int) -> torch.Tensor:
    return torch.empty(shape, device=GPU).uniform_(0.5, 1.5).mul_(0.01 * k**-0.5)


def many_rows(lines: JsonLines, name: str) -> None:
    """cuBLAS's products: of bfloat16, and of FP8 and INT8 with scales of rows or blocks."""
    shape = MANY_SHAPES[name]
    n, k = shape.outputs * (2 if shape.fused else 1), shape.inputs
    weight, codes, integers = randn(n, k), _codes(n, k, FP8), _codes(n, k, torch.int8)
    of_outputs, of_blocks = _scales((1, n), k), _scales((n // BLOCK, k // BLOCK), k)
    for rows in (64, 128, 256, 512, 1024, 2048, 4096):
        x, bytes_, int_x = randn(rows, k), _codes(rows, k, FP8), _codes(rows, k, torch.int8)
        of_rows, of_chunks = _scales((rows, 1), 1), _scales((k // BLOCK, rows), 1)
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
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--layers", type=int, default=8, help="of a step")
    parser.add_argument("--quantization", default="fp8", help="formats of weights, comma separated")
    parser.add_argument("--products", default=",".join(PRODUCTS), help="whose tiles are tried")
    parser.add_argument("--rows", default="1,16,32,64", metavar="ROWS")
    parser.add_argument("--context", type=int, default=1024, help="tokens a row")
    parser.add_argument("--many", default="", metavar="SHAPES", help=f"of {', '.join(MANY_SHAPES)}: many rows")
    options = parser.parse_args(argv)
    lines = JsonLines(options.file)
    torch.manual_seed(0)
    rows = [int(each) for each in options.rows.split(",")]
    whole, layers = ModelConfig.from_folder(SHAPES / options.shape), options.layers
    config = replace(whole, num_layers=layers, windowed_layers=whole.windowed_layers[:layers])
    pool = random_pool(config, max(rows) * -(-options.context // BLOCK_TOKENS))
    for quantization in filter(None, options.quantization.split(",")):
        weights = load_weights(
            config, SHAPES / options.shape, torch.bfloat16, "cuda:0", "dummy", pack=False,
            recipe=recipe_for(quantization, config), keep_quantised=True,
        )  # fmt: skip
        steps = Steps(config, weights, pool, max(rows), options.context, options.products.split(","))
        _timed(lines, "compiled", partial(compile_ahead, partial(try_all, steps, rows)))
        for num_rows in rows:
            about: dict[str, object] = {"shape": options.shape, "format": quantization}
            tune(lines, steps, num_rows, about, layers)
        del steps, weights
    for name in filter(None, options.many.split(",")):
        many_rows(lines, name)
    return 0


def _timed(lines: JsonLines, what: str, run: Callable[[], int]) -> None:
    began_at = time.monotonic()
    count = run()
    lines.write(kernel=what, count=count, seconds=round(time.monotonic() - began_at, 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
