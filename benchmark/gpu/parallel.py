"""What ranks of a tensor parallel worker take on GPUs: norms that sum over ranks, and decode steps of a rank.

With one GPU a rank runs alone and sends to itself in the place of the others: all but the links between GPUs. With as
many GPUs as ranks (`--gpus 0 1`) each rank is a process, and they exchange over CUDA IPC; then steps of one rank that
has the whole model come first, where it fits (`--alone`). One JSON line a cell on standard output: `norm` has the
microseconds of one launch in a graph, beside a norm of the same rows that sums nothing; `rank_step` the milliseconds of
decode steps as `bench decode` has them, with what ranks exchange and, on one GPU, without.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from baton.benchmark.gpu.ceilings import seconds
from baton.benchmark.gpu.decode import GREEDY, DecodeBatch, blocks_for, contexts_of, gpu_ms, step_ms
from baton.benchmark.gpu.runners import PLAIN, random_pool
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import MeasuringChild, answer_requests
from baton.benchmark.harness.shapes import SHAPES
from baton.kernels.triton.norm import add_rms_norm
from baton.kernels.triton.rank_words import RankInbox
from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.device_pool import DeviceMemory
from baton.launch.local import free_ports
from baton.models.batch import Draw, Row
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.memory import GIB
from baton.models.cuda.peers import DevicePeers, InboxShape, RankMemory
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.partition import Rank, part_of
from baton.models.weights import load_weights

NORM_ROWS, NORM_WIDTH, NORM_CALLS = (1, 8, 64), 8192, 40
MANY_ROWS, MANY_CALLS = 2048, 4
PROMPT_TOKENS, PROMPTS = 2048, 5
"""A row of Llama-3.1-70B in bfloat16 has 16 KB."""
CELLS = "1x1024,8x1024,64x1024"


class GroupMemory:
    """A rank's memory for exchanges, which other processes can map."""

    def __init__(self, layout: RankMemory, gpu: int) -> None:
        self._gpu = gpu
        self._memory = DeviceMemory(1, layout.size_bytes, gpu)
        self.peers = DevicePeers(layout, self._memory.data.view(-1), VOCABULARY)

    @property
    def handle(self) -> str:
        return self._memory.handle.hex()

    def connect(self, handles: Sequence[str]) -> None:
        cudart.use_device(self._gpu)
        own = self.handle
        self.peers.connect(
            [self._memory.pointer if each == own else cudart.open_handle(bytes.fromhex(each)) for each in handles]
        )


VOCABULARY = 128256
"""Of the shapes here."""


def norm_memory(rank: Rank, gpu: int, rows: int = max(NORM_ROWS)) -> GroupMemory:
    inboxes = (
        InboxShape(rows, NORM_WIDTH, torch.int32, sums=True),
        InboxShape(1, 1, torch.int64),
        InboxShape(1, 4, torch.int32),
    )
    return GroupMemory(RankMemory(rank, inboxes), gpu)


def norm_us(num_rows: int, ranks: RankInbox | None, gpu: int, *, pdl: bool) -> float:
    """Of one part of each row, added to the residual."""
    device = f"cuda:{gpu}"
    x, residual, out = (torch.randn(num_rows, NORM_WIDTH, device=device).bfloat16() for _ in range(3))
    weight = torch.ones(NORM_WIDTH, dtype=torch.bfloat16, device=device)
    call = partial(add_rms_norm, x, residual, weight, 1e-5, out, ranks=ranks, pdl=pdl)
    return seconds([call] * (NORM_CALLS if num_rows < MANY_ROWS else MANY_CALLS)) * 1e6


def nccl_us(num_rows: int, gpu: int, rank: Rank, port: int) -> float:
    """Of torch's all-reduce of so many rows, which the norm would follow; without multicast if NCCL is set so."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", init_method=address, rank=rank.index, world_size=rank.count)
    x, times = torch.randn(num_rows, NORM_WIDTH, device=f"cuda:{gpu}").bfloat16(), []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(MANY_CALLS):
            dist.all_reduce(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    dist.destroy_process_group()
    return sorted(times)[len(times) // 2] * 1e3 / MANY_CALLS


class RankSide:
    """One rank's part of a shape, with random weights and KV."""

    def __init__(self, shape: str, rank: Rank, gpu: int, quantization: str, cells: str) -> None:
        torch.cuda.set_device(gpu)
        gc.collect()  # what was before
        torch.cuda.empty_cache()
        before_bytes = torch.cuda.memory_allocated(gpu)
        self.config, self.rank, self.gpu = ModelConfig.from_folder(SHAPES / shape), rank, gpu
        self._cells = {name: contexts_of(name) for name in cells.split(",")}
        rows, longest = max(map(len, self._cells.values())), max(map(max, self._cells.values()))
        self._longest = max(longest, PROMPT_TOKENS) + 1
        contexts = (*self._cells.values(), [PROMPT_TOKENS])
        self._num_blocks = max(sum(map(blocks_for, each)) for each in contexts) + 8
        self._limits = StepLimits(rows, 2048)
        recipe = recipe_for(None if quantization == PLAIN else quantization, self.config)
        began_at, device = time.monotonic(), f"cuda:{gpu}"
        self._weights = load_weights(
            self.config,
            SHAPES,
            torch.bfloat16,
            device,
            "dummy",
            pack=False,
            rank=rank,
            recipe=recipe,
            keep_quantised=True,
        )
        torch.cuda.synchronize()
        self.start = {
            "weights_gib": round((torch.cuda.memory_allocated(gpu) - before_bytes) / GIB, 2),
            "weights_s": round(time.monotonic() - began_at, 2),
        }
        self._pool = random_pool(part_of(self.config, rank), self._num_blocks, device=device)
        self.memory = None
        if rank.count > 1:
            layout = RankMemory.of(self.config, rank, torch.bfloat16, self._limits.max_tokens)
            self.memory = GroupMemory(layout, gpu)

    def runner(self, *, exchanges: bool = True) -> CudaRunner:
        """Without exchanges: as a model that is no wider than this part."""
        peers = self.memory.peers if exchanges and self.memory is not None else None
        config = self.config if exchanges else part_of(self.config, self.rank)
        limits, form = self._limits, self._pool.format
        made = CudaRunner(config, self._weights, CudaQueue(self.gpu), limits, self._longest, None, form, peers)
        made.bind_pool(self._pool.tensors.data, self._longest, scales=self._pool.tensors.scales)
        made.warm_up()
        return made

    def prompt_ms(self, runner: CudaRunner) -> float:
        """Median of a step that computes a prompt, from its launch to its read."""
        draw, blocks, times = Draw(GREEDY, (), PROMPT_TOKENS, 0), range(blocks_for(PROMPT_TOKENS)), []
        for _ in range(PROMPTS):
            began_at = time.perf_counter()
            runner.launch([Row([1] * PROMPT_TOKENS, 0, blocks, draw)]).read()
            times.append(time.perf_counter() - began_at)
        return round(statistics.median(times) * 1e3, 2)

    def measure(self, runner: CudaRunner, cell: str) -> dict[str, float]:
        contexts = self._cells[cell]
        wall_ms, host_ms = step_ms(runner, DecodeBatch(contexts, self._num_blocks))
        timed_ms = gpu_ms(runner, DecodeBatch(contexts, self._num_blocks))
        return {"step_ms": round(wall_ms, 3), "gpu_ms": round(timed_ms, 3), "host_ms": round(host_ms, 3)}


def on_one_gpu(lines: JsonLines, shapes: Sequence[str], quantization: str, cells: str) -> None:
    """shapes: NAME:RANKS."""
    plain = {(rows, pdl): norm_us(rows, None, 0, pdl=pdl) for rows in NORM_ROWS for pdl in (False, True)}
    for count in (2, 8):
        memory = norm_memory(Rank(0, count), 0)
        for (rows, pdl), plain_us in plain.items():
            found_us = norm_us(rows, memory.peers.sums, 0, pdl=pdl)
            sizes = {"ranks": count, "gpus": 1, "rows": rows, "width": NORM_WIDTH, "pdl": pdl}
            lines.put("norm", **sizes, us=round(found_us, 2), plain_us=round(plain_us, 2))
    for shape, _, num_ranks in (each.partition(":") for each in shapes):
        part = RankSide(shape, Rank(0, int(num_ranks)), 0, quantization, cells)
        runners = {exchanges: part.runner(exchanges=exchanges) for exchanges in (True, False)}
        for cell in cells.split(","):
            for exchanges, runner in runners.items():
                names: dict[str, object] = {
                    "shape": shape,
                    "ranks": int(num_ranks),
                    "gpus": 1,
                    "cell": cell,
                    "quantization": quantization,
                }
                lines.put("rank_step", **names, exchanges=exchanges, **part.measure(runner, cell), **part.start)
        del part, runners, runner
        torch.cuda.empty_cache()


class RankServer:
    """What a process of a rank does when it is asked; the process of rank 0 asks itself too."""

    def __init__(self, rank: Rank, gpu: int) -> None:
        torch.cuda.set_device(gpu)
        self._rank, self._gpu = rank, gpu
        self._norms = norm_memory(rank, gpu)
        self._many: GroupMemory | None = None
        self._steps: RankSide | None = None
        self._runner: CudaRunner | None = None

    def answer(self, request: list[Any]) -> Any:
        match request:
            case ["norms"]:
                return self._norms.handle
            case ["connect_norms", handles]:
                return self._norms.connect(handles)
            case ["norm", rows, pdl]:
                return norm_us(rows, self._norms.peers.sums, self._gpu, pdl=pdl)
            case ["many"]:
                self._many = norm_memory(self._rank, self._gpu, MANY_ROWS)
                return self._many.handle
            case ["connect_many", handles]:
                assert self._many is not None, "made before"
                return self._many.connect(handles)
            case ["norm_of_many"]:
                assert self._many is not None, "made before"
                return norm_us(MANY_ROWS, self._many.peers.sums, self._gpu, pdl=False)
            case ["nccl", port]:
                return nccl_us(MANY_ROWS, self._gpu, self._rank, port)
            case ["prompt"]:
                assert self._steps is not None and self._runner is not None, "loaded before"
                return self._steps.prompt_ms(self._runner)
            case ["load", shape, quantization, cells]:
                self._steps = self._runner = None
                torch.cuda.empty_cache()
                self._steps = RankSide(shape, self._rank, self._gpu, quantization, cells)
                self._runner = self._steps.runner()
                assert self._steps.memory is not None, "of several ranks"
                return self._steps.memory.handle
            case ["connect", handles]:
                assert self._steps is not None and self._steps.memory is not None, "loaded before"
                return self._steps.memory.connect(handles)
            case ["step", cell]:
                assert self._steps is not None and self._runner is not None, "loaded before"
                return self._steps.measure(self._runner, cell)
        raise ValueError(f"unknown request {request}")


class RankProcesses:
    """Processes of all ranks; this one is rank 0."""

    def __init__(self, gpus: Sequence[int]) -> None:
        self._own = RankServer(Rank(0, len(gpus)), gpus[0])
        served = ("parallel", "--gpus", *map(str, gpus), "--serve")
        self._children = [MeasuringChild(*served, str(index)) for index in range(1, len(gpus))]

    def ask(self, *request: object) -> list[Any]:
        """The answers of all ranks, which answer at the same time."""
        for child in self._children:
            child.send(request)
        return [self._own.answer(list(request)), *(child.receive() for child in self._children)]

    def close(self) -> None:
        for child in self._children:
            child.close()


def on_gpus(lines: JsonLines, gpus: Sequence[int], shapes: Sequence[str], quantization: str, cells: str) -> None:
    group, count = RankProcesses(gpus), len(gpus)
    group.ask("connect_norms", group.ask("norms"))
    for rows in NORM_ROWS:
        for pdl in (False, True):
            found_us, plain_us = group.ask("norm", rows, pdl), norm_us(rows, None, gpus[0], pdl=pdl)
            sizes = {"ranks": count, "gpus": count, "rows": rows, "width": NORM_WIDTH, "pdl": pdl}
            lines.put("norm", **sizes, us=round(max(found_us), 2), plain_us=round(plain_us, 2))
    for shape in shapes:
        group.ask("connect", group.ask("load", shape, quantization, cells))
        for cell in cells.split(","):
            found = group.ask("step", cell)
            names: dict[str, object] = {
                "shape": shape,
                "ranks": count,
                "gpus": count,
                "cell": cell,
                "quantization": quantization,
            }
            lines.put(
                "rank_step", **names, exchanges=True, **found[0], step_ms_of_ranks=[each["step_ms"] for each in found]
            )
        prompts_ms = group.ask("prompt")
        lines.put("prompt", shape=shape, ranks=count, gpus=count, tokens=PROMPT_TOKENS, step_ms=max(prompts_ms))
    group.ask("connect_many", group.ask("many"))
    plain_us = norm_us(MANY_ROWS, None, gpus[0], pdl=False)
    sizes = {"ranks": count, "gpus": count, "rows": MANY_ROWS, "width": NORM_WIDTH}
    lines.put("norm", **sizes, us=round(max(group.ask("norm_of_many")), 1), plain_us=round(plain_us, 1))
    lines.put("nccl", **sizes, us=round(max(group.ask("nccl", free_ports(1)[0])), 1))
    group.close()


def alone(lines: JsonLines, shapes: Sequence[str], quantization: str, cells: str) -> None:
    """Steps of one rank that has all of the model."""
    for shape in shapes:
        whole = RankSide(shape, Rank(), 0, quantization, cells)
        runner = whole.runner()
        for cell in cells.split(","):
            names: dict[str, object] = {
                "shape": shape,
                "ranks": 1,
                "gpus": 1,
                "cell": cell,
                "quantization": quantization,
            }
            lines.put("rank_step", **names, exchanges=False, **whole.measure(runner, cell), **whole.start)
        lines.put("prompt", shape=shape, ranks=1, gpus=1, tokens=PROMPT_TOKENS, step_ms=whole.prompt_ms(runner))
        del whole, runner
        torch.cuda.empty_cache()


def main(argv: Sequence[str]) -> int:
    parser = new_parser("parallel", __doc__)
    parser.add_argument("--gpus", nargs="+", type=int, default=[0], help="of the ranks; one: a rank alone")
    parser.add_argument("--shapes", nargs="*", default=[], help="of benchmark/shapes; on one GPU NAME:RANKS")
    parser.add_argument("--alone", nargs="*", default=[], help="shapes of which one rank has all, first")
    parser.add_argument("--quantization", default=PLAIN, help="format of the weights")
    parser.add_argument("--cells", default=CELLS, help="rows x tokens, comma separated")
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        server = RankServer(Rank(options.serve, len(options.gpus)), options.gpus[options.serve])
        answer_requests(server.answer)
        return 0
    lines = JsonLines(options.output)
    alone(lines, options.alone, options.quantization, options.cells)
    if len(options.gpus) > 1:
        on_gpus(lines, options.gpus, options.shapes, options.quantization, options.cells)
    else:
        shapes = options.shapes or ["llama-3.1-8b:2", "llama-3.1-70b:8"]
        on_one_gpu(lines, shapes, options.quantization, options.cells)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
