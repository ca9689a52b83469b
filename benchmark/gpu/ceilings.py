"""Limits of the GPU at hand, measured: bytes moved and bf16 operations a second. And how a call is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

GPU = "cuda"

Call = Callable[[], object]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU).normal_()


@cache
def side_stream() -> torch.cuda.Stream:
    """One for all: cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream()


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All of them, in one graph."""
    torch.cuda.synchronize()
    with torch.cuda.stream(side_stream()):
        for call in calls[:2]:  # compiles, which a capture cannot
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


def seconds(calls: Sequence[Call], replays: int = 9) -> float:
    """Median seconds of one call, in a graph of all of them."""
    graph, times = captured(calls), []
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[2:])[replays // 2] / 1e3 / len(calls)


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy_bytes_s: float
    """Read and written together, of 4 GiB that are read and as many written."""
    matmul_flop_s: float
    """Of a product of 8192 x 8192 matrices by cuBLAS."""

    @classmethod
    def measure(cls) -> Ceilings:
        source, target = randn(2 << 30), randn(2 << 30)
        copied_s = seconds([partial(torch.neg, source, out=target)] * 4)  # copy_ in a graph is a slower memcpy
        a, b, c = (randn(8192, 8192) for _ in range(3))
        multiplied_s = seconds([partial(torch.mm, a, b, out=c)] * 10)
        return cls(2 * source.nbytes / copied_s, 2 * 8192**3 / multiplied_s)

    def values(self) -> dict[str, object]:
        """For a line of results."""
        return {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_tb_s": round(self.copy_bytes_s / 1e12, 3),
            "matmul_tflop_s": round(self.matmul_flop_s / 1e12, 1),
        }
