"""The settings of a prefill worker, and the sizes that follow from them on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.node.settings import option
from baton.worker.settings import CPU_SIZES, CUDA_SIZES, FULL_STEP_TOKENS, WorkerSettings, WorkerSizes

GPU_CHUNK_TOKENS = 4096
"""KV of a chunk moves while the next is computed: of a longer prompt only the last chunk's is waited for."""


@dataclass(frozen=True, slots=True)
class PrefillSizes:
    """Sizes of a prefill worker on its device: as given, else the device's defaults."""

    worker: WorkerSizes
    max_chunk_tokens: int
    full_step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSettings(WorkerSettings):
    policy: str = option(
        "fcfs", choices=("fcfs", "sjf"), help="order of prompts: by arrival, or shortest first with aging"
    )
    max_chunk_tokens: int | None = option(
        None, unit="tokens", help="longest chunk of one prompt in a step; default 512, on a GPU 4096", minimum=1
    )
    full_step_tokens: int | None = option(
        None,
        unit="tokens",
        help="stop adding prompts to a step beyond this many tokens; default 512, on a GPU 1024",
        minimum=1,
    )

    def worker_sizes(self, device: str) -> WorkerSizes:
        on_gpu = replace(CUDA_SIZES, max_num_batched_tokens=GPU_CHUNK_TOKENS)
        return self.resolved(CPU_SIZES if device == "cpu" else on_gpu)

    def sizes(self, device: str) -> PrefillSizes:
        """The sizes on "cpu" or "cuda"."""
        chunk_tokens, full_tokens = (512, 512) if device == "cpu" else (GPU_CHUNK_TOKENS, FULL_STEP_TOKENS)
        return PrefillSizes(
            self.worker_sizes(device), self.max_chunk_tokens or chunk_tokens, self.full_step_tokens or full_tokens
        )
