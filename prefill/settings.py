"""The settings of a prefill worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.node.settings import option
from baton.worker.settings import WorkerSettings

GPU_CHUNK_TOKENS = 4096
FULL_STEP_TOKENS = 1024
"""A step of so many computes as many tokens a second as a longer one, but for 2 % (docs/benchmarks/steps.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSettings(WorkerSettings):
    policy: str = option("fcfs", choices=("fcfs", "sjf"), help="order of prompts: arrival, or shortest first, aging")
    max_chunk_tokens: int = option(
        0, unit="tokens", help="longest chunk of one prompt in a step; 0: 512, on a GPU 4096", minimum=0
    )
    full_step_tokens: int = option(
        0,
        unit="tokens",
        help="so far other prompts join the first one in a step: more only keep it waiting; 0: 512, on a GPU 1024",
        minimum=0,
    )

    def sizes_of(self, device: str) -> Mapping[str, Any]:
        sizes = WorkerSettings.sizes_of(self, device)
        if device == "cpu":
            return {**sizes, "max_chunk_tokens": 512, "full_step_tokens": 512}
        # KV of a chunk moves while the next is computed: of a longer prompt only the last one's is waited for.
        return {
            **sizes,
            "max_chunk_tokens": GPU_CHUNK_TOKENS,
            "max_num_batched_tokens": GPU_CHUNK_TOKENS,
            "full_step_tokens": FULL_STEP_TOKENS,
        }
