"""The settings of a decode worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.node.settings import option
from baton.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings(WorkerSettings):
    max_chunk_tokens: int = option(
        0,
        unit="tokens",
        help="longest chunk of a prompt that is computed here, beside decoding; 0: 128, on a GPU 2048",
        minimum=0,
    )
    spare_blocks: int = option(
        4, unit="blocks", help="blocks that a reservation must leave free for running sequences to grow", minimum=0
    )

    def sizes_of(self, device: str) -> Mapping[str, Any]:
        sizes = WorkerSettings.sizes_of(self, device)
        return {**sizes, "max_chunk_tokens": 128 if device == "cpu" else 2048}
