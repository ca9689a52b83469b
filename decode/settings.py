"""The settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass

from node.settings import option
from worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings(WorkerSettings):
    max_chunk_tokens: int = option(
        128, unit="tokens", help="longest chunk of a prompt that is computed here, beside decoding", minimum=1
    )
    spare_blocks: int = option(
        4, unit="blocks", help="blocks that a reservation must leave free for running sequences to grow", minimum=0
    )
