"""The settings of a prefill worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.settings import option
from worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSettings(WorkerSettings):
    policy: str = option("fcfs", choices=("fcfs", "sjf"), help="order of prompts: arrival, or shortest first, aging")
    max_chunk_tokens: int = option(
        0, unit="tokens", help="longest chunk of one prompt in a step; 0: 512, on a GPU 8192", minimum=0
    )

    def sizes_of(self, device: str) -> Mapping[str, Any]:
        sizes = WorkerSettings.sizes_of(self, device)
        return {**sizes, "max_chunk_tokens": 512 if device == "cpu" else 8192}
