"""The settings of a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass

from node.settings import option
from worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSettings(WorkerSettings):
    policy: str = option("fcfs", choices=("fcfs", "sjf"), help="order of prompts: arrival, or shortest first, aging")
    max_chunk_tokens: int = option(512, unit="tokens", help="longest chunk of one prompt in a step", minimum=1)
