"""Times of the attention kernels, decode and prefill, beside torch's attention over contiguous keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from baton.benchmark.gpu import sdpa
from baton.benchmark.gpu.ceilings import GPU, Call, randn, seconds
from baton.benchmark.gpu.kernel_report import DIM, HEADS, KV_HEADS, KernelReport
from baton.benchmark.gpu.runners import chat_lengths
from baton.kernels.triton import decode_attention, prefill_attention, prefill_gluon
from baton.kernels.triton.decode_plan import DecodePlan, fixed_plan, split_plan
from baton.kernels.triton.decode_work import COLUMNS, share_out
from baton.kernels.triton.pool import PagedPool


def decode(report: KernelReport) -> None:
    """Beside torch's attention, as `prefill`."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    memory = randn(12 << 30)  # 24 GiB, seen as pools of several shapes
    cases = [(rows, 1024) for rows in (1, 8, 16, 20, 32, 64, 128, 256)]
    cases += [(rows, 8192) for rows in (1, 8, 32, 64)] + [(1, 32768), (8, 32768)]
    for rows, length in cases:
        size = rows * length * KV_HEADS * DIM * 4
        layers = max(2, min(32, (20 << 30) // size))
        calls_made = min(layers, max(2, (3 << 30) // size)) if size > 8 << 20 else layers
        query, out = randn(rows, HEADS, DIM), randn(rows, HEADS, DIM)
        lengths = torch.full((rows,), length, dtype=torch.int32, device=GPU)
        for block_tokens in (64, 16):
            width = length // block_tokens
            num_blocks = rows * width
            pool = memory[: num_blocks * layers * 2 * block_tokens * KV_HEADS * DIM]
            pool = pool.view(num_blocks, KV_HEADS, layers, 2, block_tokens, DIM)
            tables = torch.randperm(num_blocks, device=GPU).int().view(rows, width)
            for name, plan in (
                ("fast", split_plan(rows, KV_HEADS, sms, elements=HEADS // KV_HEADS * DIM)),
                ("fixed_256", fixed_plan(rows, KV_HEADS, length, sms, 256)),
                ("fixed_512", fixed_plan(rows, KV_HEADS, length, sms, 512)),
                ("fixed_1024", fixed_plan(rows, KV_HEADS, length, sms, 1024)),
            ):
                if name != "fast" and block_tokens == 16:
                    continue
                calls = decode_calls(query, pool, range(calls_made), tables, lengths, plan, out)
                report.moved(
                    "decode_attention", size, calls, rows=rows, length=length, block_tokens=block_tokens, plan=name,
                    chunks=plan.num_chunks,
                )  # fmt: skip
                if name == "fast" and block_tokens == 64:
                    calls[0]()  # of layer 0
                    keys_values = sdpa.contiguous(pool, 0, tables)
                    others = memory[: calls_made * keys_values.numel()].view(calls_made, *keys_values.shape)
                    report_decode_sdpa(report, query, keys_values, others, out)


def decode_calls(
    query: torch.Tensor,
    pool: torch.Tensor,  # [blocks, KH, layers, 2, block_tokens, D]
    layers: Iterable[int],
    tables: torch.Tensor,
    lengths: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
) -> list[Call]:
    """A call a layer. The sharing out, once a step, is not in them."""
    scratch = decode_attention.DecodeScratch.make(len(query), plan.num_chunks, HEADS, KV_HEADS, DIM, GPU)
    share_out(lengths, plan, scratch.work)
    paged = PagedPool.of(pool)
    return [
        partial(decode_attention.decode_attention, query, paged, layer, tables, lengths, plan, scratch, out)
        for layer in layers
    ]


def mixed(report: KernelReport) -> None:
    """Decode attention over sequences of unequal lengths, and the sharing out before it."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    pool = randn(16384, KV_HEADS, 8, 2, 64, DIM)
    cells = {
        "1 x 32000, 7 x 1000": [32000] + [1000] * 7,
        "1 x 32000, 31 x 1000": [32000] + [1000] * 31,
        "1 x 32000, 63 x 1000": [32000] + [1000] * 63,
        "4 x 32000, 60 x 1000": [32000] * 4 + [1000] * 60,
        "63 x 1000, 1 x 32000": [1000] * 63 + [32000],
        "33 x 1000, in steps of 48": [1000] * 33 + [0] * 15,
        **{f"{rows} chats": chat_lengths(rows) for rows in (8, 24, 32, 64, 128, 256)},
    }
    for name, each in cells.items():
        width, rows = -(-max(each) // 64), len(each)
        query, out, lengths = randn(rows, HEADS, DIM), randn(rows, HEADS, DIM), torch.tensor(each).int().to(GPU)
        blocks, tables = torch.randperm(len(pool)).tolist(), torch.zeros(rows, width, dtype=torch.int32)
        for row, length in enumerate(each):
            used = -(-length // 64)
            tables[row, :used] = torch.tensor([blocks.pop() for _ in range(used)])
        plan = split_plan(rows, KV_HEADS, sms, elements=HEADS // KV_HEADS * DIM)
        calls = decode_calls(query, pool, range(8), tables.to(GPU), lengths, plan, out)
        report.moved("decode_attention", sum(each) * KV_HEADS * DIM * 4, calls, lengths=name, tokens=sum(each))
        work = torch.zeros(plan.num_chunks, COLUMNS.value, dtype=torch.int32, device=GPU)
        took = seconds([partial(share_out, lengths, plan, work)] * 8)
        report.line(kernel="share_out", lengths=name, us=round(took * 1e6, 2))


def pools(report: KernelReport) -> None:
    """Decode attention by the layers of the pool: they decide how far apart the units of a sequence lie."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    deepest = 40
    memory = randn(4096 * deepest * 2 * 64 * KV_HEADS * DIM)  # 40 GiB
    for layers in (8, 10, 12, 15, 16, 18, 20, 24, 25, 28, 30, 32, 35, 36, 40):
        pool = memory[: 4096 * layers * 2 * 64 * KV_HEADS * DIM].view(4096, KV_HEADS, layers, 2, 64, DIM)
        for rows, length in ((8, 32768), (256, 1024)):
            query, out = randn(rows, HEADS, DIM), randn(rows, HEADS, DIM)
            lengths = torch.full((rows,), length, dtype=torch.int32, device=GPU)
            plan = split_plan(rows, KV_HEADS, sms, elements=HEADS // KV_HEADS * DIM)
            for order, blocks_of in (("random", torch.randperm(4096)), ("rising", torch.arange(4096))):
                tables = blocks_of.to(GPU).int().view(rows, -1)
                calls = decode_calls(query, pool, (0, layers // 2, layers - 1), tables, lengths, plan, out)
                report.moved(
                    "decode_attention", rows * length * KV_HEADS * DIM * 4, calls, rows=rows, length=length,
                    layers=layers, order=order,
                )  # fmt: skip


def report_decode_sdpa(
    report: KernelReport, query: torch.Tensor, keys_values: torch.Tensor, others: torch.Tensor, ours: torch.Tensor
) -> None:
    """torch's attention of one token a row over `others` [calls, 2, rows, KH, L, D], checked with `keys_values`."""
    _, rows, _, length, _ = keys_values.shape
    kernel, values = "decode_attention", {"rows": rows, "length": length, "kv": "contiguous"}
    for name, backend in sdpa.BACKENDS.items():
        try:
            way = sdpa.checked_call(backend, query[:, :, None], keys_values[0], keys_values[1], ours[:, :, None])
        except sdpa.Unsupported as refused:
            report.line(kernel=kernel, **values, by=name, refused=str(refused))
            continue
        if way.expanded:  # four times the bytes
            report.line(kernel=kernel, **values, by=name, refused="shares no heads")
            continue
        calls = [partial(sdpa.attend, backend, query[:, :, None], *each) for each in others]
        report.moved(kernel, keys_values.nbytes, calls, **values, by=name)


def prefill(report: KernelReport) -> None:
    """Beside torch's attention, which reads contiguous keys and values where ours reads pages: see sdpa.py."""
    counter = torch.zeros(2, dtype=torch.int32, device=GPU)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for num_new, cached in ((512, 0), (1024, 0), (2048, 0), (4096, 0), (8192, 0), (32768, 0), (2048, 8192)):
        length = num_new + cached
        for block_tokens in (64, 16):
            pool = randn(length // block_tokens, KV_HEADS, 2, 2, block_tokens, DIM)
            paged = PagedPool.of(pool)
            tables = torch.randperm(length // block_tokens, device=GPU).int()[None]
            query, out = randn(num_new, HEADS, DIM), randn(num_new, HEADS, DIM)
            starts = torch.tensor([0, num_new], dtype=torch.int32, device=GPU)
            lengths = torch.tensor([length], dtype=torch.int32, device=GPU)
            tokens = prefill_attention.block_m(DIM)
            work = prefill_attention.work_list([num_new], [length], HEADS, tokens).to(GPU)
            call = partial(
                prefill_attention.prefill_attention, query, paged, 0, tables, starts, lengths, work, tokens, out
            )
            ways: dict[str, Call] = {"triton": call}
            if prefill_gluon.is_available(torch.cuda.get_device_capability()):
                for name, given in (("gluon", None), ("gluon_persistent", counter)):
                    ways[name] = partial(
                        prefill_gluon.prefill_attention, query, paged, 0, tables, starts, lengths, work, sms, given, out
                    )
            for name, each in ways.items():
                report_prefill(report, each, num_new, cached, by=name, block_tokens=block_tokens)
        call()  # over the last pool, the portable kernel
        report_prefill_sdpa(report, query, sdpa.contiguous(pool, 0, tables), out)


def report_prefill_sdpa(
    report: KernelReport, query: torch.Tensor, keys_values: torch.Tensor, ours: torch.Tensor
) -> None:
    """torch's attention of one sequence: query and ours [N, H, D], keys_values [2, 1, KH, L, D]."""
    num_new, cached = len(query), keys_values.shape[3] - len(query)
    query, ours = (each.transpose(0, 1)[None].contiguous() for each in (query, ours))
    for name, backend in sdpa.BACKENDS.items():
        values = {"by": name, "kv": "contiguous"}
        try:
            way = sdpa.checked_call(backend, query, keys_values[0], keys_values[1], ours)
        except sdpa.Unsupported as refused:
            report.line(kernel="prefill_attention", new=num_new, cached=cached, **values, refused=str(refused))
            continue
        report_prefill(report, way.call, num_new, cached, **values, heads="copied" if way.expanded else "shared")


def report_prefill(report: KernelReport, call: Call, num_new: int, cached: int, **values: object) -> None:
    flops = 4 * HEADS * DIM * (num_new * cached + num_new * (num_new + 1) / 2)
    took = seconds([call] * (8 if num_new + cached <= 4096 else 2))
    report.line(
        kernel="prefill_attention", new=num_new, cached=cached, **values, us=round(took * 1e6, 1),
        tflop_s=round(flops / took / 1e12, 1), of_matmul=round(flops / took / report.ceilings.matmul_flop_s, 3),
    )  # fmt: skip
