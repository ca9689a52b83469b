"""What a runner on a GPU makes for the pool that it is bound to: tables of blocks, buffers of uploads, captured steps.

Knows nothing of how a step uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.cuda.attention import ChunkAttention
from baton.models.cuda.chunks import ChunkShape
from baton.models.cuda.graphs import DecodeGraphs
from baton.models.cuda.queue import Upload, Work
from baton.models.cuda.slots import Slots


@dataclass(frozen=True, slots=True)
class CapturedChunks:
    """Parts of prompts as one launch, in one shape."""

    shape: ChunkShape
    launch: Work


@dataclass(frozen=True, slots=True)
class PoolBinding:
    """What depends on the pool: how many blocks a sequence may have, and how large its blocks are."""

    block_tokens: int
    slots: Slots
    inputs: StepInputs
    upload: Upload
    attention: ChunkAttention
    chunk_upload: Upload
    scratch: DecodeScratch
    graphs: DecodeGraphs
    adapted: DecodeGraphs
    """Of steps with rows that have adapters; those without run as if there were none."""
    accepted: DecodeGraphs
    """Taking in what was drawn, where there are drafts."""
    edited: DecodeGraphs
    """Drawing alone, for steps with a row that asks for more than a temperature; one kernel after the other would take
    the host longer than the GPU."""
    both: torch.Tensor
    """int32 [3, most tokens]: tokens, positions and KV slots of a step of both kinds."""
    proposed: DecodeGraphs
    """Proposing drafts by a model, by the number of rows."""
    chunk_steps: list[CapturedChunks]
    """Smallest first."""
    adapted_chunk_steps: list[CapturedChunks]
    """Those with adapters."""
