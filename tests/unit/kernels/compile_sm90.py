"""Compiles the kernels for sm_90, as their wrappers launch them, on a machine without a GPU; run as a process.

The wrappers are called with tensors that have no memory, and a launch only compiles: what is compiled is what a GPU
would get, alignment hints included. Arguments name the cases. Prints one JSON line a kernel: what ptxas assigned, and
which instructions it was given (they are read in PTX: to disassemble takes longer than to compile).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from baton.kvtransfer.blocks.layout import KVLayout, Scales
from baton.kvtransfer.blocks.views import kv_tensors

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
compiled: list = []


class NoDevice:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead_of_launching() -> None:
    driver.set_active(NoDevice())
    run = JITFunction.run

    def compile_only(self, *args, grid=None, warmup=False, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only


def inspect(case: str, kernel) -> dict[str, str | int | bool]:
    """Registers and stack as ptxas assigned them, spills being on the stack, and which instructions it was given."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "case": case,
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": kernel.metadata.shared,
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
        "bytes": "".join(set(re.findall(r"wgmma.mma_async\S+[.](e4m3|s8)[.](?:e4m3|s8)", kernel.asm["ptx"]))),
        "mma": "mma.sync" in kernel.asm["ptx"],
        "tma": "cp.async.bulk.tensor" in kernel.asm["ptx"],
        "awaited_twice": awaited_twice(kernel.asm["ttgir"]),
        "halves": halves_in_place(kernel.asm["ptx"]),
    }


def awaited_twice(ttgir: str) -> list[str]:
    """Volatile loads of tensors of which several threads read the same element."""
    layouts: dict[str, list[int]] = {}
    for name, body in re.findall(r"(#blocked\d*) = #ttg.blocked<{(.*?)}>", ttgir):
        threads, warps = (
            list(map(int, re.search(rf"{of} = \[([\d, ]+)\]", body)[1].split(",")))
            for of in ("threadsPerWarp", "warpsPerCTA")
        )
        layouts[name] = [a * b for a, b in zip(threads, warps, strict=True)]
    loads = re.findall(r"isVolatile = true[}] : tensor<([\dx]+)x!tt[.]ptr<\w+>, (#\w+)>", ttgir)
    return [
        f"{shape} by {layouts[name]} threads"
        for shape, name in loads
        if any(size < threads for size, threads in zip(map(int, shape.split("x")), layouts[name], strict=True))
    ]


def halves_in_place(ptx: str) -> bool:
    """Whether decode_fp8 takes halves 0 and 1 of keys from the first of two neighbouring words, 2 and 3 from the
    second: that an operation is given neighbours at a time is up to the compiler."""
    pairs = re.findall(r"ld.shared.v2.b32\s+{(%r\d+), (%r\d+)}", ptx)
    taken = re.findall(r"mov.b32 {(?:half, other|other, half)}, (%r\d+);", ptx)
    quarter = len(taken) // 4
    firsts, seconds = ({pair[number] for pair in pairs} for number in (0, 1))
    return quarter > 0 and set(taken[: 2 * quarter]) <= firsts and set(taken[2 * quarter :]) <= seconds


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pool(kv_heads: int, block_tokens: int, dim: int, dtype=torch.bfloat16, scales: Scales = "none"):
    from baton.kernels.triton.pool import PagedPool

    name = "float8_e4m3fn" if scales != "none" else str(dtype).removeprefix("torch.")
    digest = "some" if scales == "static" else ""
    layout = KVLayout(32, 0, kv_heads, kv_heads, dim, block_tokens, name, scales=scales, scales_digest=digest)
    tensors = kv_tensors(empty(64 * layout.block_bytes, dtype=torch.uint8), layout, 64)
    static = empty(32, 2, kv_heads, dtype=torch.float32) if scales == "static" else None
    return PagedPool.of(tensors.data, static if static is not None else tensors.scales)


def small_kernels() -> None:
    from baton.kernels.triton import activation, norm, rope_write

    hidden, rows, heads, kv_heads, dim = 4096, 8, 32, 8, 128
    x, weight = empty(rows, hidden), empty(hidden)
    norm.rms_norm(x, weight, 1e-5, x, pdl=True)
    norm.add_rms_norm(empty(4, rows, hidden, dtype=torch.float32), x, weight, 1e-5, x, pdl=True)
    norm.add_rms_norm(x, x, weight, 1e-5, x, output_norm=weight, pdl=True)
    activation.silu_and_mul(empty(rows, 28672), empty(rows, 14336), pdl=True)
    tables = rope_write.RopeTables(*(empty(8192, dim // 2, dtype=torch.float32) for _ in range(2)))
    norms = rope_write.HeadNorms(empty(heads + kv_heads, dim), 1e-6)
    ids = empty(rows, dtype=torch.int32)
    rope_write.rope_and_write(
        empty(2, rows, (heads + 2 * kv_heads) * dim, dtype=torch.float32),
        ids,
        ids,
        tables,
        norms,
        pool(kv_heads, 64, dim),
        3,
        empty(rows, heads, dim),
        pdl=True,
    )


def ranks(count: int) -> None:
    """The sum of all ranks in a norm, the best token of all, all logits, and a meeting."""
    from baton.kernels.triton import norm, rank_vocabulary, sampling
    from baton.kernels.triton.rank_words import RankInbox

    def inbox(rows: int, width: int, words: torch.dtype, counters: int, two_steps: bool = False) -> RankInbox:
        whole = {"dtype": torch.int32}
        targets, places = empty(count, dtype=torch.int64), 2 if two_steps else count
        held = empty(places, 2, rows, width, dtype=words)
        return RankInbox(1, count, held, targets, empty(counters, **whole), empty(1, **whole), two_steps)

    rows, hidden, vocab_size = 8, 8192, 128256
    x, share, tokens = empty(rows, hidden), empty(rows, vocab_size // count), empty(rows, dtype=torch.int64)
    sums, drawn = inbox(256, hidden, torch.int32, 256, count > 2), inbox(256, 1, torch.int64, 256)
    norm.add_rms_norm(x, x, empty(hidden), 1e-5, x, ranks=sums, pdl=True)
    narrow, few = inbox(256, 256, torch.int32, 256, count > 2), empty(rows, 256)  # columns for half of the threads
    norm.add_rms_norm(few, few, empty(256), 1e-5, few, ranks=narrow, pdl=True)
    if count > 2:
        return
    scratch = sampling.SamplingScratch.make(rows, vocab_size, "meta")
    temperatures, first = empty(rows, dtype=torch.float32), vocab_size // count
    sampling.draw(share, temperatures, tokens, tokens, scratch, tokens, ranks=drawn, first_token=first)
    rank_vocabulary.meet(drawn)
    width = share.shape[1]
    logits = inbox(16, width, torch.int32, 16 * rank_vocabulary.pieces_of(width))
    rank_vocabulary.gather_logits(share, logits, empty(rows, vocab_size))


def keys_and_values() -> None:
    from baton.kernels.triton.kv_write import kv_write

    slots = empty(8, dtype=torch.int32)
    kv_write(empty(8, 8, 128), empty(8, 8, 128), slots, pool(8, 64, 128), 3)
    scaled = pool(16, 64, 192, torch.float8_e4m3fn, "token")
    kv_write(empty(8, 16, 192), empty(8, 16, 128), slots, scaled, 3)


def activations_in_codes(run: int) -> None:
    from baton.kernels.triton import activation, norm, quantise

    rows = 8
    for code_type, width in ((torch.float8_e4m3fn, 8192), (torch.int8, 28672)):
        scales = empty(*((width // run, rows) if run else (rows,)), dtype=torch.float32)
        out = quantise.CodedRows(empty(rows, width, dtype=code_type), scales)
        quantise.quantise(empty(rows, width), out)
        activation.silu_and_mul(empty(rows, 2 * width), out)
        if width == 8192:
            parts = empty(2, rows, width, dtype=torch.float32)
            norm.add_rms_norm(parts, empty(rows, width), empty(width), 1e-5, out)


def decode(
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    plan: tuple,
    pdl: bool = False,
    dtype=torch.bfloat16,
    scales: Scales = "none",
    sinks: bool = False,
) -> None:
    from baton.kernels.triton import decode_attention as module
    from baton.kernels.triton.decode_plan import DecodePlan

    rows, plan = 8, DecodePlan(*plan)
    query, lengths = empty(rows, heads, dim, dtype=dtype), empty(rows, dtype=torch.int32)
    scratch = module.DecodeScratch.make(rows, plan.num_chunks, heads, kv_heads, dim, "meta")
    paged, tables = pool(kv_heads, block_tokens, dim, dtype, scales), empty(rows, 64, dtype=torch.int32)
    extra = {"sinks": empty(heads, dtype=torch.float32)} if sinks else {}
    module.decode_attention(query, paged, 3, tables, lengths, plan, scratch, query, pdl=pdl, **extra)


def share_out() -> None:
    from baton.kernels.triton import decode_work
    from baton.kernels.triton.decode_plan import DecodePlan

    work = empty(512, decode_work.COLUMNS.value, dtype=torch.int32)
    lengths = empty(256, dtype=torch.int32)
    decode_work.share_out(lengths, DecodePlan(512, 3), work)
    decode_work.share_out(lengths, DecodePlan(512, 3, queries=4), work, lengths, lengths)


def prefill(
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    window: int | None = None,
    scales: Scales = "none",
    sinks: bool = False,
) -> None:
    from baton.kernels.triton import prefill_attention as module

    sequences, query = 4, empty(1024, heads, dim)
    paged, tables = pool(kv_heads, block_tokens, dim, scales=scales), empty(sequences, 64, dtype=torch.int32)
    starts, lengths = empty(sequences + 1, dtype=torch.int32), empty(sequences, dtype=torch.int32)
    work, tokens = empty(500, 3, dtype=torch.int32), module.block_m(dim)
    extra = {"sinks": empty(heads, dtype=torch.float32)} if sinks else {}
    module.prefill_attention(query, paged, 3, tables, starts, lengths, work, tokens, query, window=window, **extra)


def whole_blocks() -> None:
    from baton.kernels.triton import blocks

    units, ids = empty(512, 32, 2, 64, 128), empty(16, dtype=torch.int32)
    sums, layer_bytes = empty(16, dtype=torch.int64), 2 * 64 * 128 * 2
    blocks.block_checksums(units, ids, blocks.checksum_scratch(16, units), sums)
    steps = empty(512 * 32 * 2, 64, 128)  # half of a layer, as padding may be
    blocks.block_checksums(steps, ids, blocks.checksum_scratch(16, steps, layer_bytes), sums, layer_bytes)
    blocks.block_checksums(units, ids, blocks.checksum_scratch(16, units, layer_bytes), sums, layer_bytes, layer_bytes)
    blocks.gather_blocks(units, ids, units)
    blocks.scatter_blocks(units, ids, units)


def sampling() -> None:
    from baton.kernels.triton import sampling as module

    rows, vocab_size = 8, 128256
    logits, out = empty(rows, vocab_size), empty(rows, dtype=torch.int64)
    scratch = module.SamplingScratch.make(rows, vocab_size, "meta")
    module.argmax(logits, scratch, out, pdl=True)
    module.draw(logits, empty(rows, dtype=torch.float32), out, out, scratch, out, pdl=True)


def scores_of_prompts() -> None:
    from baton.kernels.triton import prompt_logprobs as module

    vocab_size, targets = 128256, empty(8192, dtype=torch.int32)
    out = module.PromptLogprobRows.make(8192, 128, vocab_size, "meta")
    for rows, first, num_top in ((128, 0, 1), (127, 129, 20)):  # one kernel for all
        module.prompt_logprobs(empty(rows, vocab_size), targets, first, num_top, out)


def sampling_of_rows(dtype: torch.dtype) -> None:
    from baton.kernels.triton import logprobs, sampling_filter, sampling_rows

    rows, vocab_size, device = 8, 151936, "meta"
    logits, slots, out = empty(rows, vocab_size, dtype=dtype), *(empty(rows, dtype=torch.int32) for _ in range(2))
    tables = sampling_rows.SlotTables.make(rows, vocab_size, device)
    prepared = sampling_rows.Prepared.make(rows, vocab_size, device)
    scratch = sampling_filter.FilterScratch.make(rows, vocab_size, device)
    blocks = prepared.largest.shape[1]
    best = (empty(rows, blocks, dtype=torch.float32), empty(rows, blocks, dtype=torch.int32))
    for drafted in (None, (tables.table[:, 0], empty(rows, 7, dtype=torch.int32))):
        sampling_rows.prepare(logits, slots, slots, tables, prepared, drafted)
    sampling_filter.thresholds(prepared, slots, tables, scratch)
    for counts in (True, False):
        sampling_rows.draw_prepared(logits, slots, slots, tables, prepared, scratch.thresholds, best, out, counts)
    logprobs.logprobs(logits, slots, out, tables, logprobs.LogprobRows.make(rows, vocab_size, device))
    compiled[:] = {kernel.hash: kernel for kernel in compiled}.values()  # the passes of a search are few kernels


def linears(table: str, rows: int, pdl: bool) -> None:
    """All entries of the policy's table for so many rows, in the table's order."""
    from baton.kernels.triton import linear as module
    from baton.kernels.triton import linear_policy

    for (n, k, fused, _), tiles in getattr(linear_policy, table)[rows].items():
        shape = (rows, n) if tiles.splits == 1 else (tiles.splits, rows, n)
        out = empty(*shape, dtype=torch.bfloat16 if tiles.splits == 1 else torch.float32)
        gelu = fused and k == 3584  # Gemma-2-9B's
        weight = empty(2 * n if fused else n, k)
        module.linear(empty(rows, k), weight, None, tiles, out, fused=fused, gelu=gelu, pdl=pdl)


def dequantised_weights() -> None:
    from baton.kernels.triton import dequantise as module

    n, k, scales = 28672, 4096, (32, 28672)
    for block in ((1, k), (128, 128)):
        sizes = (n // block[0], k // block[1])
        module.dequantise_scaled(
            empty(n, k, dtype=torch.float8_e4m3fn), empty(*sizes, dtype=torch.float32), *block, empty(n, k)
        )
    for zeros, order in ((None, None), (empty(*scales, dtype=torch.int8), empty(k, dtype=torch.int32))):
        words = empty(n, k // 4, dtype=torch.int16)
        module.dequantise_groups(words, empty(*scales, dtype=torch.float16), zeros, order, 256, empty(n, k))


def int4_weight(n: int, k: int, group: int, zeros: bool):
    from baton.kernels import GroupedLinear
    from baton.kernels.linear.grouped import block_size

    scales = (k // group, n)
    of_groups = empty(*scales, dtype=torch.float16), empty(*scales, dtype=torch.int8) if zeros else None
    return GroupedLinear(empty(n, k // 4, dtype=torch.int16), *of_groups, block_size(k, group))


def int4_products(rows: int, group: int, zeros: bool) -> None:
    from baton.kernels.triton import linear_int4 as module
    from baton.kernels.triton.linear_policy import Tiles

    weight, x = int4_weight(8192, 4096, group, zeros), empty(rows, 4096)
    tiles = Tiles(128 if rows <= 64 else 64, weight.block, rows, 3, 2, 8 if rows == 64 else 4)
    module.linear_int4(x, weight, tiles, empty(2, rows, 8192, dtype=torch.float32), pdl=True)
    if rows <= 32:
        tiles = Tiles(64, weight.block, rows, 4, 1)
        module.linear_int4(x, weight, tiles, empty(rows, 4096), fused=True, pdl=True)


def int4_gluon(rows: int, warps: int, zeros: bool, fused: bool) -> None:
    from baton.kernels.triton import linear_int4_gluon as module
    from baton.kernels.triton.linear_policy import Tiles

    weight, n = int4_weight(8192, 4096, 128, zeros), 4096 if fused else 8192
    tiles = Tiles(64 if fused else 128, weight.block, rows, 6, 1 if fused else 2, warps)
    out = empty(rows, n) if fused else empty(2, rows, n, dtype=torch.float32)
    module.linear_int4_gluon(empty(rows, 4096), weight, tiles, 132, out, fused=fused, pdl=True)


def linears_8bit(rows: int, blocked: bool, runs: bool) -> None:
    """Of FP8 and INT8, alone and fused, in tiles that are used for so many rows."""
    from baton.kernels.triton.linear_8bit import linear_8bit
    from baton.kernels.triton.linear_policy import Tiles
    from baton.kernels.triton.quantise import CodedRows

    n, k = 4096, 4096
    tiles = Tiles(64, 256, rows, 4, 1)
    for code_type in (torch.float8_e4m3fn, torch.int8):
        for fused in (False, True):
            wide = 2 * n if fused else n
            scales = (wide // 128, k // 128) if blocked else (wide,)
            of_x = empty(*((k // 128, rows) if runs else (rows,)), dtype=torch.float32)
            x = CodedRows(empty(rows, k, dtype=code_type), of_x)
            codes, of_codes = empty(wide, k, dtype=code_type), empty(*scales, dtype=torch.float32)
            linear_8bit(x, codes, of_codes, None, tiles, empty(rows, n), fused=fused, pdl=True)


def linears_8bit_gluon(rows: int, blocked: bool) -> None:
    """Of FP8 and INT8, split and fused, as many stages as two programs on a multiprocessor leave room for; of
    scales of blocks one program, of two groups of warps."""
    from baton.kernels.triton.linear_8bit_gluon import linear_8bit_gluon
    from baton.kernels.triton.linear_8bit_policy import stages_that_fit
    from baton.kernels.triton.linear_policy import Tiles
    from baton.kernels.triton.quantise import CodedRows

    n, k = 4096, 4096
    for code_type in (torch.float8_e4m3fn,) if blocked else (torch.float8_e4m3fn, torch.int8):
        for fused in (False, True):
            wide = 2 * n if fused else n
            of_x = empty(*((k // 128, rows) if blocked else (rows,)), dtype=torch.float32)
            x = CodedRows(empty(rows, k, dtype=code_type), of_x)
            codes = empty(wide, k, dtype=code_type)
            scales = empty(*((wide // 128, k // 128) if blocked else (wide,)), dtype=torch.float32)
            groups = 2 if blocked else 1
            stages = stages_that_fit(rows, 2 // groups, groups)
            tiles = Tiles(64 if fused else 128, 128, rows, stages, 1 if fused else 2, 4 * groups)
            out = empty(rows, n) if fused else empty(2, rows, n, dtype=torch.float32)
            linear_8bit_gluon(x, codes, scales, None, tiles, 132, out, fused=fused, pdl=True)


def prefill_gluon(block_tokens: int, persistent: bool) -> None:
    from baton.kernels.triton import prefill_gluon as module

    sequences, query = 4, empty(1024, 32, 128)
    paged, tables = pool(8, block_tokens, 128), empty(sequences, 64, dtype=torch.int32)
    starts, lengths = empty(sequences + 1, dtype=torch.int32), empty(sequences, dtype=torch.int32)
    work, counter = empty(500, 3, dtype=torch.int32), empty(2, dtype=torch.int32) if persistent else None
    module.prefill_attention(query, paged, 3, tables, starts, lengths, work, 132, counter, query)


def widen() -> None:
    from baton.kernels.triton import widen as module
    from baton.kernels.triton.pool import PagedPool

    tables, lengths = empty(4, 64, dtype=torch.int32), empty(4, dtype=torch.int32)
    out = PagedPool.of(empty(256, 8, 1, 2, 64, 128))
    for scales in ("token", "static"):
        module.widen_context(pool(8, 64, 128, scales=scales), 3, tables, lengths, out, tables, 132)


def latent(heads: int, block_tokens: int, query_rank: int = 0) -> None:
    from baton.kernels.triton import latent_decode, latent_prefill, latent_products, latent_write
    from baton.kernels.triton.decode_attention import DecodeScratch
    from baton.kernels.triton.decode_plan import DecodePlan
    from baton.kernels.triton.pool import PagedPool
    from baton.kernels.triton.rope_write import RopeTables

    def ids(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    rows, plan, weight = 8, DecodePlan(40, 3, 4), empty(heads, 256, 512)
    paged = PagedPool.of(empty(64, 1, 27, 1, block_tokens, 576), planes=1)
    scratch = DecodeScratch.make(rows, plan.num_chunks, heads, 1, 512, "meta")
    query, out = empty(rows, heads, 192), empty(rows, heads, 128)
    latent_decode.latent_decode_attention(
        empty(rows, heads, 576), paged, 3, ids(rows, 64), plan, scratch, scale=0.1, pdl=True
    )
    if block_tokens < 64:
        return
    latent_products.absorb(query, weight, empty(rows, heads, 576), pdl=True)
    latent_products.raise_merged(scratch, plan, weight, out, pdl=True)
    tables = RopeTables(*(empty(8192, 32, dtype=torch.float32) for _ in range(2)))
    norm, written = (empty(query_rank), empty(rows, query_rank)) if query_rank else (None, query)
    x = empty(rows, written[0].numel() + 576)
    latent_write.latent_write(
        x, empty(512), norm, 1e-6, ids(rows), ids(rows), tables, paged, 3, written, interleaved=True, pdl=True
    )
    latent_write.rotate_queries(empty(rows, heads * 192), ids(rows), tables, query, interleaved=True, pdl=True)
    if query_rank:
        return  # prompts compute a head at a time, with each number of heads alike
    expanded = latent_prefill.Expanded.make(8192, 1024, heads, 128, 128, 64, torch.bfloat16, "meta")
    latent_prefill.latent_prefill_attention(
        query, paged, 3, ids(4, 64), ids(5), ids(4), ids(500, 3), weight, expanded, 132, out, scale=0.1
    )
    compiled[:] = {kernel.hash: kernel for kernel in compiled}.values()  # a slice is as another


def adapted_latents(max_rank: int, scaled: bool) -> None:
    """What adapters change of keys and values of DeepSeek-V2-Lite."""
    from baton.kernels.triton import latent_pairs
    from baton.kernels.triton.decode_attention import DecodeScratch
    from baton.kernels.triton.decode_plan import DecodePlan
    from baton.kernels.triton.low_rank import BankSite
    from baton.kernels.triton.pool import PagedPool

    rows, heads, plan = 8, 16, DecodePlan(40, 3, 4)
    scales = empty(32, 1 << 17, dtype=torch.float32) if scaled else None
    site, weight = BankSite(5, 16, 32, 512, (heads * 256,), 4096), empty(heads, 256, 512)
    ids = empty(64, 64, dtype=torch.int32)
    pairs = latent_pairs.LatentPairs(replace(adapter_bank(max_rank), scales=scales), [site] * 27, ids[0])
    scratch = DecodeScratch.make(rows, plan.num_chunks, heads, 1, 512, "meta")
    latent_pairs.absorb_pairs(empty(rows, heads, 192), weight, empty(rows, heads, 576), pairs, 3, pdl=True)
    latent_pairs.raise_pairs(scratch, plan, weight, empty(rows, heads, 128), pairs, 3, pdl=True)
    paged, expanded = PagedPool.of(empty(64, 1, 27, 1, 64, 576), planes=1), empty(8192, heads * 256)
    latent_pairs.expand_pairs(paged, 3, ids[:4], ids[0, :5], ids[0, :4], expanded, pairs, 0, 264, 64)


def gated_product() -> None:
    from baton.kernels.triton import product_gluon

    product_gluon.gated_product(empty(2048, 4096), empty(28672, 4096), 132, empty(2048, 14336))


def routes(tokens: int, experts: int, top_k: int, tile_m: int):
    from baton.kernels.routing import Routing
    from baton.kernels.triton.route import Routes

    return Routes.make(tokens, Routing(experts, top_k), tile_m, "meta")


def routing(tokens: int, num_experts: int, pdl: bool) -> None:
    """Of Qwen3-30B-A3B with 128 experts, of DeepSeek-V3 with 256."""
    from baton.kernels.routing import Routing
    from baton.kernels.triton import route as module

    of_v3 = Routing(256, 8, True, True, 2.5, num_groups=8, kept_groups=4, groups_by_two=True)
    rules, width = (of_v3, 7168) if num_experts == 256 else (Routing(num_experts, 8), 2048)
    correction = empty(num_experts, dtype=torch.float32) if rules.sigmoid else None
    logits, made = empty(8, tokens, num_experts, dtype=torch.float32), module.Routes.make(tokens, rules, 16, "meta")
    module.router(empty(tokens, width), empty(num_experts, width), None, logits, pdl=pdl)
    slots = empty(tokens, dtype=torch.int32)
    module.choose(logits, rules, correction, slots, range(num_experts), made, pdl=pdl)


def experts(tile_m: int) -> None:
    """Of Qwen3-30B-A3B: gate and up from tokens, down from rows; tile_m 0: of one token."""
    from baton.kernels.triton import experts as module
    from baton.kernels.triton import experts_policy
    from baton.kernels.triton.linear_policy import ProductShape

    tokens = max(tile_m, 1)
    made = routes(tokens, 128, 8, tokens)
    for n, k, fused in ((768, 2048, True), (2048, 768, False)):
        shape = ProductShape(n, k, fused)
        tiles = experts_policy.rows_tiles(shape, tile_m, 100, 2) if tile_m else experts_policy.row_tiles(shape)
        weight = empty(128, 2 * n if fused else n, k)
        x, out = empty(tokens if fused else len(made.tokens), k), empty(len(made.tokens), n)
        module.experts(x, weight, made, tiles, out, fused=fused, gathered=fused, pdl=True)


def adapted_experts(tile_m: int, max_rank: int) -> None:
    """The same with what adapters add."""
    from baton.kernels.triton import expert_pairs, experts_policy
    from baton.kernels.triton import experts as module
    from baton.kernels.triton.linear_policy import ProductShape
    from baton.kernels.triton.low_rank import BankSite

    tokens, n, k = max(tile_m, 1), 768, 2048
    made, of_tokens = routes(tokens, 128, 8, tokens), empty(tokens, dtype=torch.int32)
    bank, rows = adapter_bank(max_rank), len(made.tokens)
    hidden = empty(tokens * 8 * 2 * max_rank, dtype=torch.float32)
    x, gated, wide = empty(tokens, k), empty(rows, n), empty(rows, 2 * n)
    pairs = expert_pairs.ExpertPairs(bank, BankSite(5, 16, 32, k, (n, 2 * n)), of_tokens)
    expert_pairs.add_experts(x, pairs, made, hidden, wide, gathered=True, add=False, pdl=True)
    shape = ProductShape(n, k, True)
    tiles = experts_policy.rows_tiles(shape, tile_m, 100, 2) if tile_m else experts_policy.row_tiles(shape)
    added = expert_pairs.MadePairs(wide, of_tokens)
    module.experts(x, empty(128, 2 * n, k), made, tiles, gated, fused=True, gathered=True, added=added, pdl=True)
    pairs = expert_pairs.ExpertPairs(bank, BankSite(5, 16, 32, n, (k,)), of_tokens)
    expert_pairs.add_experts(gated, pairs, made, hidden, empty(rows, k), gathered=False, add=True, pdl=True)


def experts_8bit(tile_m: int, blocked: bool) -> None:
    from baton.kernels.triton import experts_8bit as module
    from baton.kernels.triton.linear_policy import Tiles
    from baton.kernels.triton.quantise import CodedRows

    made, code_type = routes(tile_m, 128, 8, tile_m), torch.float8_e4m3fn
    rows = len(made.tokens)

    def coded(count: int, width: int, run: int) -> CodedRows:
        scales = (width // run, count) if run else (count,)
        return CodedRows(empty(count, width, dtype=code_type), empty(*scales, dtype=torch.float32))

    for n, k, fused in ((768, 2048, True), (2048, 768, False)):
        wide, tiles = 2 * n if fused else n, Tiles(128 if fused else 64, 128, tile_m, 3, 1)
        of_codes = empty(*((128 * wide // 128, k // 128) if blocked else (128 * wide,)), dtype=torch.float32)
        x = coded(tile_m, k, 128 if blocked else 0) if fused else coded(rows, k, 128)
        out = coded(rows, n, 128) if fused else empty(rows, n)
        codes = empty(128, wide, k, dtype=code_type)
        module.experts_8bit(x, codes, of_codes, made, tiles, out, fused=fused, gathered=fused, pdl=True)


def experts_8bit_row(blocked: bool) -> None:
    """Of Qwen3-30B-A3B, in FP8 and INT8."""
    from baton.kernels.triton import experts_8bit_row as module
    from baton.kernels.triton import experts_policy
    from baton.kernels.triton.linear_policy import ProductShape

    made = routes(1, 128, 8, 1)
    for code_type in (torch.float8_e4m3fn, torch.int8):
        for n, k, fused in ((768, 2048, True), (2048, 768, False)):
            tiles, wide = experts_policy.row_tiles_8bit(ProductShape(n, k, fused), blocked), 2 * n if fused else n
            scales = empty(*((wide, k // 128) if blocked else (128 * wide,)), dtype=torch.float32)
            codes, x = empty(128, wide, k, dtype=code_type), empty(1 if fused else 8, k)
            given = {"fused": fused, "gathered": fused, "pdl": True}
            module.experts_8bit_row(x, codes, scales, made, tiles, empty(8, n), **given)


def experts_gluon() -> None:
    from baton.kernels.triton import experts_gluon as module
    from baton.kernels.triton.spread import spread

    tokens = 2048
    made = routes(tokens, 128, 8, module.TILE_M)
    x, gated = empty(len(made.tokens), 2048), empty(len(made.tokens), 768)
    spread(empty(tokens, 2048), made, x)
    module.experts_product(x, empty(128, 1536, 2048), made, 132, gated, gated=True)
    module.experts_product(gated, empty(128, 2048, 768), made, 132, x, gated=False)


def gpt_oss(tile_m: int) -> None:
    """Gate and up of gpt-oss-20b's experts, with biases and a gate within bounds; tile_m 0: of one token."""
    from baton.kernels import ClampedGate
    from baton.kernels.triton import experts as module
    from baton.kernels.triton import experts_policy
    from baton.kernels.triton.linear_policy import ProductShape

    size, tokens, shape = 2880, max(tile_m, 1), ProductShape(2880, 2880, True)
    tiles = experts_policy.rows_tiles(shape, tile_m, 100, 2) if tile_m else experts_policy.row_tiles(shape)
    made, weight, bias = routes(tokens, 32, 4, tokens), empty(32, 2 * size, size), empty(64 * size)
    given = {"bias": bias, "clamped": ClampedGate(7.0, 1.702), "fused": True, "gathered": True, "pdl": True}
    module.experts(empty(tokens, size), weight, made, tiles, empty(len(made.tokens), size), **given)


def whole_norms() -> None:
    from baton.kernels.triton.whole_norm import whole_norm

    qkv = empty(8, 6144)
    whole_norm(qkv, empty(2048), empty(2048), 1e-5, qkv, pdl=True)


def norm_of_experts() -> None:
    from baton.kernels.triton import norm
    from baton.kernels.triton.routed_sum import RoutedSum

    made, width = routes(16, 128, 8, 16), 2048
    added = RoutedSum(empty(len(made.tokens), width), made, empty(16, width), True)
    norm.add_rms_norm(added, empty(16, width), empty(width), 1e-5, empty(16, width), pdl=True)


def drafts() -> None:
    from baton.kernels.triton import draft_inputs, forced_drafts, sampling_rows, step_inputs
    from baton.kernels.triton import drafts as module

    def ids(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    kept = module.SlotDrafts(ids(257, 16), ids(257, 7), ids(257, 4096), ids(257, 2), 1024)
    places = draft_inputs.Places(ids(256), ids(256), ids(256), ids(256))
    inputs = step_inputs.StepInputs(ids(64), ids(64), ids(64), ids(64), ids(64, 64))
    draft_inputs.gather_drafts(ids(256), ids(256), kept.state, kept.drafts, ids(257, 64), 64, inputs, places, 4)
    results = ids(64, module.IDS.value + 7 + 1)
    tables = sampling_rows.SlotTables.make(257, 151936, "meta")
    module.accept(ids(64), ids(64), places, kept, results, tables)
    module.propose(ids(64), places, kept, results, searched=32768, longest=16, least=2, followed=4)
    forced_drafts.offer_drafts(ids(8), ids(8), ids(8), ids(8, 16), kept, ids(64, 8))


def entries_of_a_draft() -> None:
    from baton.kernels.triton import draft_inputs, drafts, eagle, step_inputs

    def ids(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    hidden, norms, x = empty(8, 4096), (empty(4096), empty(4096)), empty(8, 8192)
    for normed in (False, True):
        eagle.eagle_inputs(ids(8), empty(32000, 4096), hidden, norms, 1e-5, x, empty(8, 4096), normed_residual=normed)
    kept = drafts.SlotDrafts(ids(257, 16), ids(257, 7), ids(257, 4096), ids(257, 2), 1024)
    places = draft_inputs.Places(ids(256), ids(256), ids(256), ids(256))
    inputs, entries = step_inputs.StepInputs.make(8, 64, "meta"), eagle.EntryPlaces(ids(8), ids(8), ids(8))
    for number in (0, 1):
        eagle.entry_inputs(ids(8), places, ids(8), kept, ids(64, 12), ids(257, 64), 64, number, 7, inputs, entries)


def product_8bit() -> None:
    from baton.kernels.triton import product_8bit_gluon
    from baton.kernels.triton.quantise import CodedRows

    x = CodedRows(empty(2048, 4096, dtype=torch.int8), empty(2048, dtype=torch.float32))
    for fused in (False, True):
        codes, scales = empty(28672, 4096, dtype=torch.int8), empty(28672, dtype=torch.float32)
        out = empty(2048, 14336 if fused else 28672)
        product_8bit_gluon.product_8bit(x, codes, scales, None, 132, out, fused=fused)


def inputs_of_a_step() -> None:
    from baton.kernels.triton import step_inputs

    rows = [empty(8, dtype=torch.int32) for _ in range(4)]
    out = step_inputs.StepInputs.make(8, 64, "meta")
    step_inputs.gather_inputs(*rows, empty(8, 64, dtype=torch.int32), 64, out)
    step_inputs.set_entries(*rows[:3])


def adapted(rows: int, max_rank: int, k: int, ends: tuple[int, ...], beside: bool) -> None:
    """What adapters add to a product of an 8B model, in place, and apart if beside."""
    from baton.kernels.triton import adapter_rows, low_rank

    bank, of_rows = adapter_bank(max_rank), adapter_rows.AdapterRows.make(rows, 32, "meta")
    ids = empty(2 * rows, dtype=torch.int32)
    adapter_rows.group_rows(ids[:rows], ids, ids, of_rows)
    site = low_rank.BankSite(5, 16, 32, k, ends)
    splits = low_rank.splits_of(k, rows, deterministic=False)
    hidden = empty(splits, rows, bank.rank_width(site), dtype=torch.float32)
    memory = empty(rows * ends[-1])
    ahead = low_rank.is_ahead(k, rows, deterministic=False)
    x = empty(rows, k)
    added = low_rank.shrink(x, bank, site, of_rows, hidden, memory, ahead=ahead, beside=beside, pdl=True)
    low_rank.expand(added, empty(rows, ends[-1]), pdl=True)
    if beside:
        added.apart(pdl=True)


def adapted_linears(rows: int, scaled: bool = False) -> None:
    """The products of qkv and of gate and up with what adapters add to them; scaled: by magnitudes."""
    from baton.kernels.triton import linear, linear_policy, low_rank, row_scales

    for shape, outputs in ((linear_policy.QKV_8B, 6144), (linear_policy.GATE_UP_8B, 28672)):
        tiles = linear_policy.fastest(rows, shape)
        scales, of_rows = empty(32, 1 << 17, dtype=torch.float32)[:, 4096:][:, :outputs], empty(rows, dtype=torch.int32)
        added = low_rank.AddedRows(empty(rows, outputs), of_rows, scales if scaled else None)
        out = empty(rows, shape.outputs)
        if tiles.splits > 1:
            out = empty(tiles.splits, rows, shape.outputs, dtype=torch.float32)
        weight = empty(outputs, 4096)
        linear.linear(empty(rows, 4096), weight, None, tiles, out, fused=shape.fused, added=added, pdl=True)
        if scaled:
            row_scales.scale_rows(out, of_rows, scales[:, : shape.outputs], None, pdl=True)


def adapted_router() -> None:
    """What adapters change of logits of experts, which lie beside that of a shared expert's gate."""
    from baton.kernels.triton import adapter_rows, low_rank, row_scales

    bank, of_rows = adapter_bank(64), adapter_rows.AdapterRows.make(8, 32, "meta")
    bank = replace(bank, scales=empty(32, 1 << 17, dtype=torch.float32))
    logits, hidden = empty(4, 8, 61, dtype=torch.float32), empty(8, 8, 64, dtype=torch.float32)
    for out in (logits[..., :60], logits[..., 60:]):
        site = low_rank.BankSite(5, 16, 32, 2048, (out.shape[-1],), 4096)
        row_scales.add_in_place(low_rank.AddedProduct(bank, site, of_rows, hidden, empty(0)), out, None, pdl=True)


def whole_weights_of_adapters() -> None:
    from baton.kernels.triton import whole_weights

    vocab, hidden, norms = 128256, 4096, 65
    numbers, flags = empty(4, (2 * vocab + norms) * hidden), empty(4, 2 + norms, dtype=torch.int32)
    weights = whole_weights.WholeWeights(numbers, flags, vocab, vocab, hidden)
    ids, rows = empty(8, dtype=torch.int32), empty(8, hidden)
    whole_weights.embed_own(ids, ids, weights, rows)
    whole_weights.norm_own(rows, ids, weights, 64, 1e-5, rows)
    whole_weights.head_own(rows, ids, weights, empty(8, vocab))


def vocabulary_of_adapters(max_rank: int) -> None:
    """What adapters add to the embedding and the head of an 8B model, and to a head that is not of whole tiles."""
    from baton.kernels.triton import adapter_rows, embedding_pairs, low_rank

    bank, of_rows = adapter_bank(max_rank), adapter_rows.AdapterRows.make(8, 32, "meta")
    hidden = empty(8, 8, max_rank, dtype=torch.float32)
    site = low_rank.BankSite(4, 16, 32, 128256, (4096,))
    embedding_pairs.embed_pairs(empty(8, dtype=torch.int32), bank, site, of_rows, empty(8, 4096))
    for outputs in (128256, 128257):
        site = low_rank.BankSite(5, 16, 32, 4096, (outputs,))
        added = low_rank.AddedProduct(bank, site, of_rows, hidden, empty(0))
        low_rank.expand(added, empty(8, outputs), few_programs=low_rank.HEAD_ITEMS)


def adapter_bank(max_rank: int):
    from baton.kernels.triton.low_rank import AdapterBank

    return AdapterBank(empty(32, max_rank * (1 << 21)), empty(32, 128, dtype=torch.int32), max_rank)


WHOLE, PARTS, DEEP, DEEPEST = (16, 3), (40, 5, 4), (40, 7, 4), (40, 9, 4)
ONE_ROW = (17, 9, 16, 0, 64, 1, 16)
QKV, DOWN = (4096, (4096, 5120, 6144)), (14336, (4096,))
"""Inputs of an 8B model's products, and where the outputs of their parts end."""
CASES: dict[str, Callable[[], None]] = {
    "small": small_kernels,
    "ranks_2": lambda: ranks(2),
    "ranks_8": lambda: ranks(8),
    "keys_and_values": keys_and_values,
    "codes_of_rows": lambda: activations_in_codes(0),
    "codes_of_runs": lambda: activations_in_codes(128),
    "blocks": whole_blocks,
    "drafts": drafts,
    "entries": entries_of_a_draft,
    "step_inputs": inputs_of_a_step,
    "sampling": sampling,
    "sampling_rows": lambda: sampling_of_rows(torch.bfloat16),
    "prompt_logprobs": scores_of_prompts,
    "linear_1": lambda: linears("FASTEST", 1, True),
    "linear_16": lambda: linears("FASTEST", 16, True),
    "linear_64": lambda: linears("FASTEST", 64, True),
    "linear_128": lambda: linears("FASTEST", 128, False),
    "linear_256": lambda: linears("INVARIANT", 256, False),
    "dequantise": dequantised_weights,
    "linear_8bit_16_row": lambda: linears_8bit(16, False, False),
    "linear_8bit_16_block": lambda: linears_8bit(16, True, True),
    "linear_8bit_64_block": lambda: linears_8bit(64, True, True),
    "linear_8bit_gluon_8": lambda: linears_8bit_gluon(8, False),
    "linear_8bit_gluon_64_block": lambda: linears_8bit_gluon(64, True),
    "decode_128_page64": lambda: decode(32, 8, 128, 64, WHOLE),
    "decode_128_page64_parts": lambda: decode(32, 8, 128, 64, PARTS, pdl=True),
    "decode_128_page64_deep": lambda: decode(32, 8, 128, 64, DEEP, pdl=True),
    "share_out": lambda: share_out(),
    "decode_128_page64_deepest": lambda: decode(32, 8, 128, 64, ONE_ROW, pdl=True),
    "decode_128_page16_deepest": lambda: decode(32, 8, 128, 16, DEEPEST),
    "decode_64_page32_parts": lambda: decode(14, 2, 64, 32, PARTS),
    "decode_80_page16": lambda: decode(32, 8, 80, 16, WHOLE),
    "decode_96_page64_parts": lambda: decode(32, 8, 96, 64, PARTS),
    "decode_256_page64_deepest": lambda: decode(16, 1, 256, 64, DEEPEST),
    "float32_decode_128": lambda: decode(32, 8, 128, 64, DEEPEST, dtype=torch.float32),
    "fp8_decode_page64_deep": lambda: decode(32, 8, 128, 64, DEEP, pdl=True, scales="token"),
    "fp8_decode_page64_deepest": lambda: decode(32, 8, 128, 64, DEEPEST, pdl=True, scales="token"),
    "fp8_decode_page16_parts": lambda: decode(32, 8, 128, 16, PARTS, scales="token"),
    "fp8_static_decode_page64": lambda: decode(32, 8, 128, 64, WHOLE, scales="static"),
    "fp8_prefill_page64": lambda: prefill(32, 8, 128, 64, scales="token"),
    "fp8_prefill_page16": lambda: prefill(32, 8, 128, 16, scales="token"),
    "fp8_prefill_page64_window": lambda: prefill(32, 8, 128, 64, 4096, scales="token"),
    "fp8_static_prefill_page64": lambda: prefill(32, 8, 128, 64, scales="static"),
    "decode_256_page16_parts": lambda: decode(16, 2, 256, 16, PARTS),
    "gluon_page64": lambda: prefill_gluon(64, True),
    "gluon_page16": lambda: prefill_gluon(16, False),
    "widen": widen,
    "latent_16": lambda: latent(16, 64),
    "latent_16_page16": lambda: latent(16, 16),
    "latent_128": lambda: latent(128, 64, 1536),
    "adapted_latents_64": lambda: adapted_latents(64, False),
    "adapted_latents_16_scaled": lambda: adapted_latents(16, True),
    "adapted_latents_256": lambda: adapted_latents(256, False),
    "gated_product": gated_product,
    "gluon_product_8bit": product_8bit,
    "route": lambda: routing(4, 256, True),
    "route_many": lambda: routing(2048, 128, False),
    "experts_row": lambda: experts(0),
    "experts_16": lambda: experts(16),
    "adapted_experts_row": lambda: adapted_experts(0, 16),
    "adapted_experts_16": lambda: adapted_experts(16, 64),
    "adapted_experts_64": lambda: adapted_experts(64, 16),
    "experts_8bit_16_block": lambda: experts_8bit(16, True),
    "experts_8bit_row": lambda: experts_8bit_row(False),
    "experts_8bit_row_block": lambda: experts_8bit_row(True),
    "experts_gluon": experts_gluon,
    "norm_of_experts": norm_of_experts,
    "gpt_oss_row": lambda: gpt_oss(0),
    "gpt_oss_16": lambda: gpt_oss(16),
    "sinks_decode": lambda: decode(64, 8, 64, 64, PARTS, pdl=True, sinks=True),
    "sinks_prefill": lambda: prefill(64, 8, 64, 64, 128, sinks=True),
    "whole_norms": whole_norms,
    "int4_16": lambda: int4_products(16, 128, True),
    "int4_16_groups_of_32": lambda: int4_products(16, 32, False),
    "int4_64": lambda: int4_products(64, 128, False),
    "int4_128": lambda: int4_products(128, 128, True),
    "int4_gluon_8": lambda: int4_gluon(8, 12, True, False),
    "int4_gluon_32": lambda: int4_gluon(32, 8, False, True),
    "adapters_16": lambda: adapted(8, 16, *QKV, beside=False),
    "adapters_64": lambda: adapted(64, 64, *DOWN, beside=False),
    "adapters_16_beside": lambda: adapted(8, 16, *DOWN, beside=True),
    "adapters_64_beside": lambda: adapted(64, 64, *QKV, beside=True),
    "vocabulary_16": lambda: vocabulary_of_adapters(16),
    "vocabulary_64": lambda: vocabulary_of_adapters(64),
    "whole_weights": whole_weights_of_adapters,
    "adapted_router": adapted_router,
    "adapted_linear_1": lambda: adapted_linears(1),
    "adapted_linear_16": lambda: adapted_linears(16),
    "adapted_linear_32": lambda: adapted_linears(32),
    "adapted_linear_64": lambda: adapted_linears(64),
    "scaled_linear_1": lambda: adapted_linears(1, scaled=True),
    "scaled_linear_16": lambda: adapted_linears(16, scaled=True),
    "scaled_linear_64": lambda: adapted_linears(64, scaled=True),
    "prefill_128_page64": lambda: prefill(32, 8, 128, 64),
    "prefill_128_page128": lambda: prefill(32, 8, 128, 128),
    "prefill_128_page16": lambda: prefill(32, 8, 128, 16),
    "prefill_128_page64_window": lambda: prefill(32, 8, 128, 64, 4096),
    "prefill_64_page64": lambda: prefill(14, 2, 64, 64),
    "prefill_80_page16": lambda: prefill(32, 8, 80, 16),
    "prefill_96_page64": lambda: prefill(32, 32, 96, 64),
    "prefill_256_page64": lambda: prefill(16, 1, 256, 64),
    "prefill_256_page16": lambda: prefill(16, 1, 256, 16),
}


def main() -> None:
    compile_instead_of_launching()
    for case in sys.argv[1:]:
        compiled.clear()
        CASES[case]()
        for kernel in compiled:
            print(json.dumps(inspect(case, kernel)), flush=True)


if __name__ == "__main__":
    main()
