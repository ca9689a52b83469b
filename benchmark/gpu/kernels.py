"""Times every Triton kernel on the GPU at hand against the limits of memory and arithmetic that it measures first.

One JSON line a measurement on standard output, and appended to FILE. PARTs are groups of kernels, by default all; the
limits (`ceilings`) are always measured. The shapes are those of an 8B model (32 query and 8 key heads of 128, hidden
4096, FFN 14336, vocabulary 128256) in bfloat16. A time is the median of replays of a CUDA graph of several calls over
several sets of random inputs, together larger than the L2 cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from baton.benchmark.gpu.attention import decode, mixed, pools, prefill
from baton.benchmark.gpu.ceilings import GPU, Ceilings, randn
from baton.benchmark.gpu.kernel_report import DIM, FFN, HEADS, HIDDEN, KV_HEADS, VOCAB, KernelReport
from baton.benchmark.gpu.latent import latent, latent_prompts
from baton.benchmark.gpu.products import products
from baton.benchmark.gpu.runners import add_quantization
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import bare_parser
from baton.kernels.triton import (
    activation,
    blocks,
    norm,
    quantise,
    rope_write,
    sampling,
)
from baton.kernels.triton.linear import linear
from baton.kernels.triton.linear_policy import (
    DOWN_8B,
    GATE_UP_8B,
    HEAD_8B,
    O_8B,
    QKV_8B,
    ProductShape,
    fastest,
    invariant,
)
from baton.kernels.triton.pool import PagedPool
from baton.kvtransfer.blocks.copies import IN_FLIGHT, Pair
from baton.kvtransfer.blocks.device_copies import DeviceCopies
from baton.kvtransfer.blocks.device_pool import DeviceMemory
from baton.kvtransfer.blocks.memory import HostMemory
from baton.models.batch import Draw
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.slots import SlotSampler
from baton.node.messages.control import SamplingSpec

ROTATED_BYTES = 400 << 20  # several times the L2 cache
ALL_PARAMETERS = {
    "top_p": 0.9, "top_k": 50, "min_p": 0.01, "frequency_penalty": 0.5, "repetition_penalty": 1.1,
    "logit_bias": ((5, 1.0),), "min_tokens": 9, "stop_token_ids": (7,), "logprobs": True, "top_logprobs": 20,
    "allowed_token_ids": tuple(range(0, 100_000, 100)), "bad_words": tuple((token, 5) for token in range(100)),
}  # fmt: skip


def ceilings(report: KernelReport) -> None:
    report.ceilings = Ceilings.measure()
    report.line(kernel="ceiling", **report.ceilings.values())


def small(report: KernelReport) -> None:
    table = torch.rand(8192, DIM // 2, device=GPU)
    for rows in (1, 64, 256, 2048):
        count = 32 if rows <= 256 else 8
        residual, weight, out = randn(count, rows, HIDDEN), randn(HIDDEN), randn(rows, HIDDEN)
        for parts in (0, 1, 2, 4) if rows <= 256 else (0,):
            x = randn(parts, rows, HIDDEN, dtype=torch.float32) if parts else randn(rows, HIDDEN)
            size = x.numel() * x.element_size() + 3 * out.numel() * 2
            for pdl in (False, True):
                calls = [partial(norm.add_rms_norm, x, residual[i], weight, 1e-5, out, pdl=pdl) for i in range(count)]
                report.moved("add_rms_norm", size, calls, rows=rows, parts=parts, pdl=pdl)
        gate_up, gated = randn(count, rows, 2 * FFN), randn(rows, FFN)
        calls = [partial(activation.silu_and_mul, gate_up[i], gated) for i in range(count)]
        report.moved("silu_and_mul", rows * FFN * 6, calls, rows=rows)
        _in_codes(report, residual, weight, gate_up)
        width = (HEADS + 2 * KV_HEADS) * DIM
        pool = PagedPool.of(randn(-(-rows // 64), KV_HEADS, count, 2, 64, DIM))
        positions = torch.randint(0, 8192, (rows,), dtype=torch.int32, device=GPU)
        slots = torch.arange(rows, dtype=torch.int32, device=GPU)
        query, norms = randn(rows, HEADS, DIM), rope_write.HeadNorms(randn(HEADS + KV_HEADS, DIM), 1e-6)
        rope = rope_write.RopeTables(table, table)
        qkv = randn(count, rows, width)
        for given in (None, norms):
            for pdl in (False, True):
                calls = [
                    partial(rope_write.rope_and_write, qkv[i], positions, slots, rope, given, pool, i, query, pdl=pdl)
                    for i in range(count)
                ]
                report.moved("rope_and_write", rows * width * 4, calls, rows=rows, normed=given is not None, pdl=pdl)


def _in_codes(report: KernelReport, residual: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Activations of FP8, with scales of rows and of runs; residual [C, N, hidden], gate_up [C, N, 2 * FFN]."""
    rows = residual.shape[1]
    for run in (0, quantise.RUN):
        narrow, wide = _coded_rows(rows, HIDDEN, run), _coded_rows(rows, FFN, run)
        for pdl in (False, True):
            given = {"rows": rows, "run": run, "pdl": pdl}
            x = residual[0].clone()
            calls = [partial(norm.add_rms_norm, x, each, weight, 1e-5, narrow, pdl=pdl) for each in residual]
            report.moved("add_rms_norm_in_codes", rows * HIDDEN * 7, calls, **given)
            calls = [partial(quantise.quantise, each, narrow, pdl=pdl) for each in residual]
            report.moved("quantise", rows * HIDDEN * 3, calls, **given)
            calls = [partial(activation.silu_and_mul, each, wide, pdl=pdl) for each in gate_up]
            report.moved("silu_and_mul_in_codes", rows * FFN * 5, calls, **given)


def _coded_rows(rows: int, width: int, run: int) -> quantise.CodedRows:
    scales = torch.zeros((width // run, -(-rows // 4) * 4) if run else (rows,), device=GPU)
    return quantise.CodedRows(torch.zeros(rows, width, dtype=torch.float8_e4m3fn, device=GPU), scales)


def choice(report: KernelReport) -> None:
    for rows in (1, 64, 256):
        logits = [randn(rows, VOCAB) for _ in range(max(2, min(64, ROTATED_BYTES // (rows * VOCAB * 2))))]
        scratch = sampling.SamplingScratch.make(rows, VOCAB, GPU)
        out = torch.zeros(rows, dtype=torch.int64, device=GPU)
        ones = torch.ones(rows, device=GPU)
        report.moved("argmax", rows * VOCAB * 2, [partial(sampling.argmax, x, scratch, out) for x in logits], rows=rows)
        calls = [partial(sampling.draw, x, ones, out, out, scratch, out) for x in logits]
        report.moved("draw", rows * VOCAB * 2, calls, rows=rows)
        for name, params in (("top_p", {"top_p": 0.9}), ("all", ALL_PARAMETERS)):
            queue = CudaQueue(0)
            sampler = SlotSampler(queue, rows, rows, VOCAB)
            for slot in range(rows):
                given = SamplingSpec(max_tokens=9, temperature=1.0, seed=slot, **params)
                sampler.set_row(slot, Draw(given, list(range(2000)), 1000, 1000))
            sampler.flush()
            queue.mark().wait()
            slots, tokens = (torch.arange(rows, dtype=torch.int32, device=GPU) for _ in range(2))
            calls = [partial(sampler.draw_edited, x, slots, slots, tokens) for x in logits]
            report.moved("draw_edited", rows * VOCAB * 2, calls, rows=rows, parameters=name)
            if name == "all":
                calls = [partial(sampler.logprobs, x, slots, tokens) for x in logits]
                report.moved("logprobs", rows * VOCAB * 2, calls, rows=rows)


def whole_blocks(report: KernelReport) -> None:
    pool = randn(400, KV_HEADS, 32, 2, 64, DIM)  # 8 MiB a block
    units = pool.flatten(0, 1)
    for count in (1, 16, 128):
        sets = [torch.randperm(400, device=GPU)[:count] for _ in range(max(2, 64 // count))]
        most = count * KV_HEADS
        scratch, checks = blocks.checksum_scratch(most, units), torch.zeros(most, dtype=torch.int64, device=GPU)
        staging, size = randn(count, *pool.shape[1:]), count * 8 << 20
        heads = torch.arange(KV_HEADS, device=GPU)
        unit_sets = [(ids[:, None] * KV_HEADS + heads).flatten() for ids in sets]
        calls = [partial(blocks.block_checksums, units, ids, scratch, checks) for ids in unit_sets]
        report.moved("block_checksums", size, calls, blocks=count)
        calls = [partial(blocks.gather_blocks, pool, ids, staging) for ids in sets]
        report.moved("gather_blocks", 2 * size, calls, blocks=count)
        calls = [partial(blocks.scatter_blocks, staging, ids, pool) for ids in sets]
        report.moved("scatter_blocks", 2 * size, calls, blocks=count)


def host_copies(report: KernelReport) -> None:
    """GB/s between locked host memory and blocks of 8 MiB, every other one of a pool: no two lie together. With the
    digests of the blocks, in batches as a worker's store client makes them, two under way."""
    size_bytes, most = 8 << 20, 128
    memory, host = DeviceMemory(2 * most, size_bytes, 0), HostMemory(most, size_bytes)
    copies = DeviceCopies(memory)
    lock = copies.lock(host.view)
    while not lock.ready():
        time.sleep(0.01)
    for count in (1, 16, most):
        pairs = [Pair(2 * number, host.block(number)) for number in range(count)]
        batches = [pairs[first : first + copies.batch_blocks] for first in range(0, count, copies.batch_blocks)]
        for name, begin in {"to_host": copies.begin_save, "to_device": copies.begin_load}.items():
            took = sorted(_copied_s(copies, begin, batches) for _ in range(5))[2]
            report.line(kernel=f"blocks_{name}", blocks=count, gb_s=round(count * size_bytes / took / 1e9, 1))
        del pairs, batches
    copies.close()
    lock.close()
    host.close()
    memory.close()


def _copied_s(copies: DeviceCopies, begin: Callable[[Sequence[Pair]], int], batches: Sequence[Sequence[Pair]]) -> float:
    began_at, pending = time.perf_counter(), []
    for batch in batches:
        pending.append(begin(batch))
        while len(pending) == IN_FLIGHT and copies.ended(pending[0]) is None:
            pass
        if len(pending) == IN_FLIGHT:
            pending.pop(0)
    for copy in pending:
        while copies.ended(copy) is None:
            pass
    return time.perf_counter() - began_at


def cublas(x: torch.Tensor, weight: torch.Tensor, plain: torch.Tensor, gated: torch.Tensor, fused: bool) -> None:
    torch.mm(x, weight.t(), out=plain)
    if fused:
        activation.silu_and_mul(plain, gated)


def linears(report: KernelReport) -> None:
    """The products of Llama-3.1-8B."""
    _linears(report, {"qkv": QKV_8B, "o": O_8B, "gate_up": GATE_UP_8B, "down": DOWN_8B, "lm_head": HEAD_8B})


def qwen3_linears(report: KernelReport) -> None:
    """Those of Qwen3-8B that differ."""
    _linears(
        report,
        {
            "gate_up": ProductShape(12288, 4096, fused=True),
            "down": ProductShape(4096, 12288),
            "lm_head": ProductShape(151936, 4096),
        },
    )


def _linears(report: KernelReport, shapes: dict[str, ProductShape]) -> None:
    for name, shape in shapes.items():
        n, k, fused = shape.outputs, shape.inputs, shape.fused
        wide = 2 * n if fused else n
        weights = [randn(wide, k).mul_(k**-0.5) for _ in range(max(3, ROTATED_BYTES // (wide * k * 2)))]
        for rows in (1, 8, 16, 32, 64, 128, 256):
            x, plain = randn(rows, k), randn(rows, wide)
            gated = randn(rows, n)

            size = wide * k * 2
            report.moved(
                "linear",
                size,
                [partial(cublas, x, w, plain, gated, fused) for w in weights],
                name=name,
                rows=rows,
                by="cublas",
            )
            for by, tiles in (("fastest", fastest(rows, shape)), ("invariant", invariant(rows, shape))):
                if tiles is None:
                    continue
                out = gated if tiles.splits == 1 else randn(tiles.splits, rows, n, dtype=torch.float32)
                for pdl in (False, True):
                    calls = [partial(linear, x, w, None, tiles, out, fused=fused, pdl=pdl) for w in weights]
                    report.moved("linear", size, calls, name=name, rows=rows, by=by, pdl=pdl)


PARTS: dict[str, Callable[[KernelReport], None]] = {
    part.__name__: part
    for part in (
        ceilings, small, choice, whole_blocks, host_copies, decode, mixed, pools, prefill, linears, qwen3_linears,
        products, latent, latent_prompts,
    )
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = bare_parser("kernels", __doc__)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="append the lines to this file as well")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    add_quantization(parser)
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART {sorted(unknown)[0]!r}: must be one of {', '.join(PARTS)}")
    report = KernelReport(JsonLines(options.file), options.quantization.split(","))
    torch.manual_seed(0)
    for name, part in PARTS.items():
        if part is ceilings or name in options.parts or not options.parts:
            part(report)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
