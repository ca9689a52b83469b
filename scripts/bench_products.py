"""Times products on the GPU at hand, each way beside cuBLAS and round by round: under a power limit clocks move.

    PYTHONPATH=.link python scripts/bench_products.py [--parts wide,few,decode] [FILE]

wide: gate and up of 512 to 8192 rows, cuBLAS and our silu * mul against product_gluon. few: the products of Qwen3-8B
for 1 to 128 rows against cuBLAS. decode: ways to cut few sequences. Checks every way before it is timed.
One JSON line a measurement on standard output, and appended to FILE.

A child measures; one that says nothing for SILENCE_S seconds, or dies, is ended and begun again without what it was
at: a kernel whose barriers wait for each other never returns.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from baton.benchmark.gpu.ceilings import GPU, Call, captured
from baton.kernels.triton import activation, linear_policy, product_gluon
from baton.kernels.triton.decode_attention import DecodeScratch, decode_attention
from baton.kernels.triton.decode_plan import DecodePlan, split_plan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.linear import linear
from baton.kernels.triton.linear_policy import GATE_UP_8B, Shape, Tiles

GATE_UP_Q8, DOWN_Q8, HEAD_Q8 = (12288, 4096, True), (4096, 12288, False), (151936, 4096, False)
"""Of Qwen3-8B; its other products are Llama-3.1-8B's."""
SILENCE_S = 25.0
MOST_RESTARTS = 8
ROUNDS = 11
GRAPH_S = 8e-3  # about what one replay takes
ROTATED_BYTES = 300 << 20  # weights in turn: several times the L2 cache
WIDE_ROWS = (512, 640, 768, 896, 1024, 1152, 1300, 1408, 1536, 1792, 2048, 2600, 3072, 4096, 6144, 8192)
WIDE = {"gate_up": GATE_UP_8B, "gate_up_qwen": GATE_UP_Q8}
FEW = {"gate_up_qwen": GATE_UP_Q8, "down_qwen": DOWN_Q8, "head_qwen": HEAD_Q8}
FEW_ROWS = (1, 8, 16, 32, 64, 128)


class Teller:
    """The child's end: JSON lines [part it is at, what it tries, a line of results or null] into a pipe.

    A way that was given up stays out: `tries` says so.
    """

    def __init__(self, pipe: int, given_up: frozenset[str]) -> None:
        self._pipe, self._given_up, self._part, self._trying = pipe, given_up, 0, ""

    def at(self, part: int) -> None:
        self._part = part
        self._tell()

    def tries(self, what: str) -> bool:
        self._trying = what
        self._tell()
        return what not in self._given_up

    def line(self, **values: object) -> None:
        self._tell(values)

    def _tell(self, line: dict[str, object] | None = None) -> None:
        os.write(self._pipe, json.dumps([self._part, self._trying, line]).encode() + b"\n")


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU).normal_(std=scale)


def side_by_side(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, float]:
    """Median seconds of a call of each graph of so many calls; every round runs all, in an order that turns."""
    names, times = list(graphs), {name: [] for name in graphs}
    for turn in range(ROUNDS + 1):
        first, events = turn % len(names), []
        for name in names[first:] + names[:first]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name][0].replay()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        if turn:
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) / 1e3 / graphs[name][1])
    return {name: sorted(values)[ROUNDS // 2] for name, values in times.items()}


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error; NaN counts as infinite."""
    value = float((found.double() - exact.double()).norm() / exact.double().norm())
    return value if value == value else float("inf")


def weights_of(shape: Shape) -> list[torch.Tensor]:
    n, k, fused = shape
    wide = 2 * n if fused else n
    return [randn(wide, k, scale=k**-0.5) for _ in range(max(2, -(-ROTATED_BYTES // (wide * k * 2))))]


def cublas(x: torch.Tensor, weight: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, fused: bool) -> None:
    torch.mm(x, weight.t(), out=wide if fused else out)
    if fused:
        activation.silu_and_mul(wide, out)


def exact_slice(x: torch.Tensor, weight: torch.Tensor, fused: bool, columns: torch.Tensor) -> torch.Tensor:
    """In float32, some columns of the result."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if not fused:
        return x.float() @ weight[columns].float().t()
    gate, up = (x.float() @ weight[columns + shift].float().t() for shift in (0, len(weight) // 2))
    return torch.nn.functional.silu(gate) * up


def is_right(
    tell: Teller, call: Call, out: torch.Tensor, exact: torch.Tensor, columns: torch.Tensor, what: str
) -> bool:
    """Runs it twice over poison; tells where it is wrong."""
    for _ in range(2):
        out.fill_(float("nan"))
        call()
        torch.cuda.synchronize()
        error, rest = off(out[:, columns], exact), bool(out.isnan().any())
        if error > 4e-3 or rest:
            tell.line(wrong=what, error=error, unwritten=rest)
            return False
    return True


def wide_cell(tell: Teller, name: str, shape: Shape, weights: list[torch.Tensor], rows: int) -> None:
    n = shape[0]
    x, out, wide = randn(rows, shape[1]), randn(rows, n), randn(rows, 2 * n)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    flops = 2 * rows * weights[0].numel()
    count = max(len(weights), round(GRAPH_S / (flops / 650e12)))
    used = [weights[i % len(weights)] for i in range(count)]
    columns = torch.cat([torch.arange(100), torch.arange(n - 100, n), torch.randint(0, n, (100,))]).to(GPU)
    exact = exact_slice(x, weights[0], True, columns)
    calls = {"cublas": [partial(cublas, x, weight, wide, out, True) for weight in used]}
    if tell.tries(f"gluon {name} {rows}"):
        these = [partial(product_gluon.gated_product, x, weight, sms, out) for weight in used]
        if is_right(tell, these[0], out, exact, columns, f"gluon {name} {rows}"):
            calls["gluon"] = these
    if not tell.tries(f"timing of {name} {rows}"):
        return
    times = side_by_side({way: (captured(these), count) for way, these in calls.items()})
    for way, took in times.items():
        tell.line(
            kernel="gated_product", weight=name, rows=rows, by=way, us=round(took * 1e6, 1),
            tflop_s=round(flops / took / 1e12, 1), of_cublas=round(times["cublas"] / took, 3),
        )  # fmt: skip


def wide_parts(tell: Teller) -> Iterator[Call]:
    def part(name: str, shape: Shape) -> None:
        weights = weights_of(shape)
        for rows in WIDE_ROWS:
            wide_cell(tell, name, shape, weights, rows)

    for name, shape in WIDE.items():
        yield partial(part, name, shape)


def few_ways(rows: int, shape: Shape) -> dict[str, Tiles]:
    """The tables' entries and their neighbours."""
    found = {"fastest": linear_policy.fastest(rows, shape), "invariant": linear_policy.invariant(rows, shape)}
    ways = {name: tiles for name, tiles in found.items() if tiles is not None}
    start = ways.get("fastest", ways["invariant"])
    if start.tile_m and rows in (16, 64, 128):
        ways["shallow"] = replace(start, stages=start.stages - 1)
        ways["half_k"] = replace(start, tile_k=start.tile_k // 2, stages=2 * start.stages - 1)
        if not shape[2]:
            ways["splits1"], ways["splits4"] = replace(start, splits=1), replace(start, splits=4)
    return ways


def few_cell(tell: Teller, name: str, shape: Shape, weights: list[torch.Tensor], rows: int) -> None:
    n, k, fused = shape
    x, out = randn(rows, k), randn(rows, n)
    wide = randn(rows, 2 * n) if fused else out
    columns = torch.arange(0, n, 7, device=GPU)
    exact = exact_slice(x, weights[0], fused, columns)
    calls: dict[str, list[Call]] = {"cublas": [partial(cublas, x, weight, wide, out, fused) for weight in weights]}
    for way, tiles in few_ways(rows, shape).items():
        for pdl in (False, True) if way in ("fastest", "invariant") else (False,):
            given = out if tiles.splits == 1 else randn(tiles.splits, rows, n, dtype=torch.float32)
            label = f"{way}{'_pdl' if pdl else ''} {tiles}"
            if not tell.tries(f"few {name} {rows} {label}"):
                continue
            these = [partial(linear, x, weight, None, tiles, given, fused=fused, pdl=pdl) for weight in weights]
            these[0]()
            error = off(given[..., columns] if tiles.splits == 1 else given.sum(0)[:, columns], exact)
            if error > 4e-3:
                tell.line(wrong=f"{name} {rows} {label}", error=error)
            else:
                calls[label] = these
    if not tell.tries(f"timing of {name} {rows}"):
        return
    times = side_by_side({way: (captured(these * 4), 4 * len(these)) for way, these in calls.items()})
    for way, took in times.items():
        tell.line(
            kernel="linear", weight=name, rows=rows, by=way, us=round(took * 1e6, 2),
            tb_s=round(weights[0].numel() * 2 / took / 1e12, 3), of_cublas=round(times["cublas"] / took, 3),
        )  # fmt: skip


def few_parts(tell: Teller) -> Iterator[Call]:
    def part(name: str, shape: Shape) -> None:
        weights = weights_of(shape)
        for rows in FEW_ROWS:
            few_cell(tell, name, shape, weights, rows)

    for name, shape in FEW.items():
        yield partial(part, name, shape)


def decode_plans(rows: int, sms: int) -> dict[str, DecodePlan]:
    """The rule's plan, and chunks of other numbers and depths."""
    plans = {"rule": split_plan(rows, 8, sms)}
    for programs, depths in ((1, (3, 5, 7, 9)), (2, (3, 5, 7)), (3, (3, 5)), (4, (3,))):
        splits = max(1, round(programs * sms / (rows * 8)))
        for stages in depths:
            plans[f"{programs}_an_sm_depth_{stages}"] = DecodePlan((splits + 1) * rows, stages, splits)
    return plans


def decode_cell(tell: Teller, pool: torch.Tensor, rows: int, length: int) -> None:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    query, width = randn(rows, 32, 128), -(-length // 64)
    tables = torch.randperm(len(pool), device=GPU)[: rows * width].int().view(rows, width)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=GPU)
    graphs, kept, first = {}, [], None  # a graph does not keep what its launches read
    for name, plan in decode_plans(rows, sms).items():
        if not tell.tries(f"decode {rows} {length} {name}"):
            continue
        out = torch.full_like(query, float("nan"))
        scratch = DecodeScratch.make(rows, plan.num_chunks, 32, 8, 128, GPU)
        share_out(lengths, plan, scratch.work)
        calls = [
            partial(decode_attention, query, pool, layer % pool.shape[1], tables, lengths, plan, scratch, out)
            for layer in range(2 * pool.shape[1])
        ]
        kept.append(calls)
        calls[0]()
        first = out.clone() if first is None else first
        if off(out, first) > 4e-3:
            tell.line(wrong=f"decode {rows} {length} {name}", error=off(out, first))
        else:
            graphs[f"{name} {plan.splits}"] = (captured(calls), len(calls))
    if not tell.tries(f"timing of decode {rows} {length}"):
        return
    for way, took in side_by_side(graphs).items():
        tell.line(
            kernel="decode_attention", rows=rows, length=length, by=way, us=round(took * 1e6, 2),
            tb_s=round(rows * length * 4096 / took / 1e12, 3),
        )  # fmt: skip


def decode_parts(tell: Teller) -> Iterator[Call]:
    def part() -> None:
        pool = randn(8 * 512, 16, 2, 64, 8, 128)
        few = [(rows, 1000) for rows in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)]
        long = [(rows, length) for rows in (1, 2, 4, 8) for length in (8000, 10000, 32000)]
        for rows, length in (*few, *long):
            decode_cell(tell, pool, rows, length)

    yield part


def measure(tell: Teller, parts: list[str], first: int) -> None:
    """The child: all parts from number `first` on."""
    torch.manual_seed(0)
    makers = {"wide": wide_parts, "few": few_parts, "decode": decode_parts}
    for number, part in enumerate(part for name in parts for part in makers[name](tell)):
        if number >= first:
            tell.at(number)
            part()
            torch.cuda.empty_cache()
    tell.line(what="done")


def begin_child(parts: list[str], first: int, given_up: frozenset[str]) -> tuple[int, int]:
    """Its process id, and the pipe that it tells into. The parent has not touched the GPU, so a fork is sound."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)
    try:
        measure(Teller(writer, given_up), parts, first)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def watch(parts: list[str], say: Callable[[dict[str, object]], None]) -> None:
    """Runs children until one has come to the end."""
    first, given_up = 0, frozenset[str]()
    for _ in range(MOST_RESTARTS):
        child, pipe = begin_child(parts, first, given_up)
        trying, done, ended = "", False, "silent"
        rest = b""
        while not done and select.select([pipe], [], [], SILENCE_S)[0]:
            read = os.read(pipe, 1 << 16)
            if not read:
                ended = "died"
                break
            *lines, rest = (rest + read).split(b"\n")
            for text in lines:
                first, trying, line = json.loads(text)
                if line is not None:
                    say(line)
                    done = line.get("what") == "done"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        if done:
            return
        say({"given_up": trying, "because": ended})
        given_up |= {trying}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="wide,few,decode", help="comma separated")
    parser.add_argument("file", nargs="?", type=Path)
    options = parser.parse_args()
    began_at = time.monotonic()

    def say(values: dict[str, object]) -> None:
        text = json.dumps({**values, "at_s": round(time.monotonic() - began_at, 1)})
        print(text, flush=True)
        if options.file is not None:
            with options.file.open("a") as file:
                file.write(text + "\n")

    watch(options.parts.split(","), say)


if __name__ == "__main__":
    main()
