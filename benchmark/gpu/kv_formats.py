"""Times attention over KV in bfloat16 and in FP8, in turns: decode steps and prompts of an 8B model's shape, by kernel.

One JSON line a kernel, format and size: the median of several times, `bytes_s` of keys and values with their scales,
or `tflop_s` of the products of prompts. Each call has another layer, so that no cache holds what the next one reads.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch

from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.gpu.kernel_report import DIM, HEADS, KV_HEADS
from baton.benchmark.gpu.runners import BLOCK_TOKENS, KV_FORMATS, RandomKv, random_pool
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.shapes import SHAPES
from baton.kernels.triton import decode_attention, prefill_attention, prefill_gluon
from baton.kernels.triton.decode_plan import FP8_AIM, split_plan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.widen import widen_context
from baton.models.config import ModelConfig

DECODE_CELLS = "1x1024,8x1024,64x1024,256x1024,64x8192,1x32768,8x32768"
PREFILL_CELLS = "512+0,2048+0,8192+0,32768+0,2048+8192,256+32768"
LAYERS = 32
REPEATS = 5


def paged(pool: RandomKv) -> PagedPool:
    data, scales = pool.tensors
    static = pool.format.static
    return PagedPool.of(data, scales if static is None else static.to(GPU))


def decode_calls(pool: PagedPool, rows: int, length: int, aim: int) -> list[Call]:
    """A call a layer."""
    plan = split_plan(
        rows, KV_HEADS, torch.cuda.get_device_properties(0).multi_processor_count, aim, elements=HEADS // KV_HEADS * DIM
    )
    query, out = randn(rows, HEADS, DIM), randn(rows, HEADS, DIM)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=GPU)
    tables = torch.randperm(len(pool.tensor), device=GPU).int()[: rows * length // BLOCK_TOKENS].view(rows, -1)
    scratch = decode_attention.DecodeScratch.make(rows, plan.num_chunks, HEADS, KV_HEADS, DIM, GPU)
    share_out(lengths, plan, scratch.work)
    layers = range(min(LAYERS, max(2, (8 << 30) // (rows * length * KV_HEADS * DIM * 4))))
    return [
        partial(decode_attention.decode_attention, query, pool, layer, tables, lengths, plan, scratch, out)
        for layer in layers
    ]


def prefill_calls(pool: PagedPool, num_new: int, cached: int, tables: torch.Tensor | None = None) -> dict[str, Call]:
    """By kernel; tables: by default at random."""
    length = num_new + cached
    query, out = randn(num_new, HEADS, DIM), randn(num_new, HEADS, DIM)
    if tables is None:
        tables = torch.randperm(len(pool.tensor), device=GPU).int()[None, : -(-length // BLOCK_TOKENS)]
    starts = torch.tensor([0, num_new], dtype=torch.int32, device=GPU)
    lengths = torch.tensor([length], dtype=torch.int32, device=GPU)
    tokens = prefill_attention.block_m(DIM)
    work = prefill_attention.work_list([num_new], [length], HEADS, tokens).to(GPU)
    arrays = (query, pool, 0, tables, starts, lengths, work)
    ways: dict[str, Call] = {"triton": partial(prefill_attention.prefill_attention, *arrays, tokens, out)}
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    if pool.scales is not None:
        plain = PagedPool.of(randn(tables.numel(), KV_HEADS, 1, 2, BLOCK_TOKENS, DIM))
        widened = torch.zeros_like(tables)
        attend = prefill_calls(plain, num_new, cached, widened)["gluon"]

        def widen_and_attend() -> None:
            widen_context(pool, 0, tables, lengths, plain, widened, sms)
            attend()

        ways["widened"] = widen_and_attend
    if prefill_gluon.is_available(torch.cuda.get_device_capability()) and prefill_gluon.reads(pool):
        counter = torch.zeros(2, dtype=torch.int32, device=GPU) if len(work) > 2 * sms else None
        ways["gluon"] = partial(prefill_gluon.prefill_attention, *arrays, sms, counter, out)
    return ways


def medians(calls: dict[str, list[Call]]) -> dict[str, float]:
    """Seconds of a call of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, each in calls.items():
            times[name].append(seconds(each))
    return {name: statistics.median(each) for name, each in times.items()}


def main(argv: Sequence[str]) -> int:
    parser = new_parser("kv_formats", __doc__)
    parser.add_argument("--kv-dtype", default=",".join(KV_FORMATS), help="formats of KV, comma separated")
    parser.add_argument("--decode", default=DECODE_CELLS, help="rows x tokens, comma separated")
    parser.add_argument("--prefill", default=PREFILL_CELLS, help="new + cached tokens, comma separated")
    parser.add_argument("--aims", default=str(FP8_AIM), help="programs of a multiprocessor in plans for FP8")
    options = parser.parse_args(argv)
    aims = [int(aim) for aim in options.aims.split(",")]
    lines = JsonLines(options.output)
    config = ModelConfig.from_folder(SHAPES / "llama-3.1-8b")
    rows = [tuple(map(int, cell.split("x"))) for cell in options.decode.split(",") if cell]
    prompts = [tuple(map(int, cell.split("+"))) for cell in options.prefill.split(",") if cell]
    tokens = max([count * length for count, length in rows] + [new + cached for new, cached in prompts])
    pools = {name: random_pool(config, tokens // BLOCK_TOKENS + 1, name) for name in options.kv_dtype.split(",")}
    views = {name: paged(pool) for name, pool in pools.items()}
    lines.put("start", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    for count, length in rows:
        plans = [(name, aim) for name, view in views.items() for aim in (aims if view.scales is not None else [1])]
        took = medians({f"{name} {aim}": decode_calls(views[name], count, length, aim) for name, aim in plans})
        for (name, aim), each in zip(plans, took.values(), strict=True):
            size = 2 * count * length * KV_HEADS * pools[name].key_bytes
            lines.put(
                "decode_attention", kv_dtype=name, aim=aim, rows=count, length=length, us=round(each * 1e6, 2),
                bytes_s=f"{size / each:.3e}",
            )  # fmt: skip
    for new, cached in prompts:
        ways = {
            f"{name} {way}": [call] * 4
            for name, view in views.items()
            for way, call in prefill_calls(view, new, cached).items()
        }
        flops = 4 * HEADS * DIM * (new * cached + new * (new + 1) / 2)
        for name, each in medians(ways).items():
            kv_dtype, by = name.split()
            lines.put(
                "prefill_attention", kv_dtype=kv_dtype, by=by, new=new, cached=cached, us=round(each * 1e6, 1),
                tflop_s=round(flops / each / 1e12, 1),
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
