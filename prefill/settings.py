"""The settings of a prefill worker, and the sizes that follow from them on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.models.config import FULL_STEP_TOKENS
from baton.node.settings import option
from baton.worker.settings import CPU_SIZES, CUDA_SIZES, WorkerSettings, WorkerSizes

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
        None,
        unit="tokens",
        help="longest chunk of one prompt in a step; default 512, on a GPU 4096, or 8192 if its experts want as many",
        minimum=1,
    )
    full_step_tokens: int | None = option(
        None,
        unit="tokens",
        help="stop adding prompts to a step beyond this many tokens; default 512, on a GPU 1024, "
        "of models with experts up to 8192: fewer leave each expert few rows",
        minimum=1,
    )

    def worker_sizes(self, device: str, full_step_tokens: int = FULL_STEP_TOKENS) -> WorkerSizes:
        on_gpu = replace(CUDA_SIZES, max_num_batched_tokens=max(GPU_CHUNK_TOKENS, full_step_tokens))
        return self.resolved(CPU_SIZES if device == "cpu" else on_gpu)

    def sizes(self, device: str, full_step_tokens: int = FULL_STEP_TOKENS) -> PrefillSizes:
        """The sizes on "cpu" or "cuda", with the model's full_step_tokens."""
        chunk_tokens, full_tokens = max(GPU_CHUNK_TOKENS, full_step_tokens), full_step_tokens
        if device == "cpu":
            chunk_tokens, full_tokens = 512, 512
        return PrefillSizes(
            self.worker_sizes(device, full_step_tokens),
            self.max_chunk_tokens or chunk_tokens,
            self.full_step_tokens or full_tokens,
        )
