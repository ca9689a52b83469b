"""The lines of kernels: bytes and operations a second beside the limits of the GPU, at the shapes of an 8B model."""

from __future__ import annotations

from collections.abc import Sequence

from baton.benchmark.gpu.ceilings import Call, Ceilings, seconds
from baton.benchmark.harness.json_lines import JsonLines

HEADS, KV_HEADS, DIM, HIDDEN, FFN, VOCAB = 32, 8, 128, 4096, 14336, 128256


class KernelReport:
    """Writes the lines. `ceilings` are measured first."""

    def __init__(self, lines: JsonLines, quantizations: Sequence[str]) -> None:
        """quantizations: of weights, for the parts that measure several formats."""
        self.line = lines.write
        self.quantizations = quantizations
        self.ceilings = Ceilings(1.0, 1.0)

    def moved(self, kernel: str, size_bytes: float, calls: Sequence[Call], **values: object) -> None:
        took = seconds(calls)
        rate = size_bytes / took
        self.line(
            kernel=kernel, **values, us=round(took * 1e6, 2), tb_s=round(rate / 1e12, 3),
            of_copy=round(rate / self.ceilings.copy_bytes_s, 3),
        )  # fmt: skip
