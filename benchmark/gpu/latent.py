"""Times of latent attention at the shapes of DeepSeek-V2-Lite (16 heads) and V3 (128): decode and prompts."""

from __future__ import annotations

from functools import partial

import torch

from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.gpu.kernel_report import KernelReport
from baton.kernels.triton import latent_decode, latent_prefill, latent_products, latent_write
from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import split_plan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.prefill_attention import work_list
from baton.kernels.triton.rope_write import RopeTables

PLAIN, ROTATED, LATENT, VALUE = 128, 64, 512, 128
ROW = LATENT + ROTATED
LAYERS = {16: 27, 128: 4}
"""Of a pool, by heads: those of V2-Lite, and few of V3's."""


def latent(report: KernelReport) -> None:
    """One new token a row."""
    for heads, rows, length in ((16, 1, 1024), (16, 1, 8192), (16, 8, 8192), (16, 64, 8192), (128, 64, 4096)):
        _decode(report, heads, rows, length)


def latent_prompts(report: KernelReport) -> None:
    """Prompts, with the expansion of their context."""
    for heads, num_new, cached, slice_tokens in (
        (16, 1024, 0, 65536), (16, 8192, 0, 65536), (16, 8192, 0, 4096), (16, 1024, 31744, 65536), (128, 4096, 0, 8192),
    ):  # fmt: skip
        _prefill(report, heads, num_new, cached, slice_tokens)


def _decode(report: KernelReport, heads: int, rows: int, length: int) -> None:
    sms, layers = torch.cuda.get_device_properties(0).multi_processor_count, LAYERS[heads]
    pool = PagedPool.of(randn(rows * length // 64, 1, layers, 1, 64, ROW), planes=1)
    tables = torch.randperm(rows * length // 64, device=GPU).int().view(rows, -1)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=GPU)
    weights = [randn(heads, PLAIN + VALUE, LATENT).mul_(LATENT**-0.5) for _ in range(layers)]
    query, absorbed, out = randn(rows, heads, PLAIN + ROTATED), randn(rows, heads, ROW), randn(rows, heads, VALUE)
    plan = split_plan(rows, latent_decode.head_tiles(heads), sms)
    scratch = DecodeScratch.make(rows, plan.num_chunks, heads, 1, LATENT, GPU)
    share_out(lengths, plan, scratch.work)
    values = {"heads": heads, "rows": rows, "length": length, "splits": plan.splits}
    size, flops = rows * length * ROW * 2, 2 * rows * heads * length * (ROW + LATENT)

    def attend(layer: int) -> None:
        latent_decode.latent_decode_attention(absorbed, pool, layer, tables, plan, scratch, scale=0.1, pdl=True)

    def whole(layer: int) -> None:
        latent_products.absorb(query, weights[layer], absorbed, pdl=True)
        attend(layer)
        latent_products.raise_merged(scratch, plan, weights[layer], out, pdl=True)

    took = seconds([partial(attend, layer) for layer in range(layers)])
    report.moved(
        "latent_decode", size, [partial(attend, layer) for layer in range(layers)], **values,
        tflop_s=round(flops / took / 1e12, 1),
    )  # fmt: skip
    report.moved("latent_decode_and_products", size, [partial(whole, layer) for layer in range(layers)], **values)
    calls: list[Call] = [partial(latent_products.absorb, query, weight, absorbed, pdl=True) for weight in weights]
    report.moved("latent_absorb", heads * PLAIN * LATENT * 2, calls, **values)
    calls = [partial(latent_products.raise_merged, scratch, plan, weight, out, pdl=True) for weight in weights]
    report.moved("latent_raise", heads * VALUE * LATENT * 2, calls, **values)
    table = torch.rand(length, ROTATED // 2, device=GPU)
    x, norm = randn(rows, heads * (PLAIN + ROTATED) + ROW), randn(LATENT)
    positions = torch.zeros(rows, dtype=torch.int32, device=GPU)
    calls = [
        partial(
            latent_write.latent_write, x, norm, None, 1e-6, positions, positions, RopeTables(table, table), pool, layer,
            query, interleaved=True, pdl=True,
        )
        for layer in range(layers)
    ]  # fmt: skip
    report.moved("latent_write", 2 * x.nbytes, calls, **values)


def _prefill(report: KernelReport, heads: int, num_new: int, cached: int, slice_tokens: int) -> None:
    sms, length = torch.cuda.get_device_properties(0).multi_processor_count, num_new + cached
    pool = PagedPool.of(randn(length // 64, 1, 2, 1, 64, ROW), planes=1)
    tables = torch.randperm(length // 64, device=GPU).int()[None]
    starts = torch.tensor([0, num_new], dtype=torch.int32, device=GPU)
    lengths = torch.tensor([length], dtype=torch.int32, device=GPU)
    work = work_list([num_new], [length], heads, latent_prefill.BLOCK_M).to(GPU)
    weight = randn(heads, PLAIN + VALUE, LATENT).mul_(LATENT**-0.5)
    query, out = randn(num_new, heads, PLAIN + ROTATED), randn(num_new, heads, VALUE)
    sizes = (slice_tokens, num_new, heads, PLAIN, VALUE, ROTATED)
    expanded = latent_prefill.Expanded.make(*sizes, torch.bfloat16, GPU)
    call = partial(
        latent_prefill.latent_prefill_attention, query, pool, 1, tables, starts, lengths, work, weight, expanded, sms,
        out, scale=0.1,
    )  # fmt: skip
    attention = 2 * heads * (PLAIN + ROTATED + VALUE) * (num_new * cached + num_new * (num_new + 1) / 2)
    expansion = 2 * heads * (PLAIN + VALUE) * LATENT * length
    took = seconds([call] * 4)
    report.line(
        kernel="latent_prefill", heads=heads, new=num_new, cached=cached, slice_tokens=slice_tokens,
        us=round(took * 1e6, 1), attention_tflop_s=round(attention / took / 1e12, 1),
        all_tflop_s=round((attention + expansion) / took / 1e12, 1),
    )  # fmt: skip
