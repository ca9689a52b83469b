"""Host memory through which steps get from a stage on a GPU to the next one: both map it, and lock its pages."""

from __future__ import annotations

import torch

from baton.kvtransfer.blocks import cudart
from baton.models.cuda.residuals import ResidualSlots
from baton.worker.ranks.loading import mapped
from baton.worker.ranks.messages import SharedBytes


def locked_slots(pid: int, memory: SharedBytes, shape: ResidualSlots) -> tuple[torch.Tensor, ...]:
    """Of memory of that process, for this thread's GPU. They keep it mapped."""
    pages = torch.frombuffer(mapped(pid, memory).view, dtype=torch.uint8)
    cudart.lock_pages(pages.data_ptr(), len(pages))
    return shape.over(pages)
