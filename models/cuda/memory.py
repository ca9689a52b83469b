"""The KV pool of a GPU: how far apart its blocks lie, and how many there are. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.errors import SettingsError

GIB = 1 << 30
GRAPHS_BYTES = 3 * GIB // 2
"""Kept for captured graphs, libraries' workspaces and the buffers of communicators, which come after the pool."""

STACKS = 5
"""Of memory, which an H100 has."""


def spread_layers(num_layers: int) -> int:
    """Layers that a block has room for: one more than the model's, if these are a multiple of five.

    Else one layer of all blocks lies mostly on four of the five stacks, and attention reads a fifth less a second
    (docs/benchmarks/kernels.md). Other GPUs do as the H100 does, since blocks go from one to the other.
    """
    return num_layers + (num_layers % STACKS == 0)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one GPU, once weights and activations have their place."""

    total_bytes: int
    free_bytes: int


def plan_blocks(memory: DeviceMemory, utilization: float, block_bytes: int) -> int:
    """Blocks of the largest pool with which at most `utilization` of the GPU is in use; SettingsError if none."""
    spared = int(memory.total_bytes * (1.0 - utilization))
    num_blocks = (memory.free_bytes - spared - GRAPHS_BYTES) // block_bytes
    if num_blocks < 2:
        raise SettingsError(
            f"no memory for a KV pool: {memory.free_bytes / GIB:.1f} of {memory.total_bytes / GIB:.1f} GiB are free "
            f"beside the model, --gpu-memory-utilization {utilization} leaves {spared / GIB:.1f} GiB unused and "
            f"{GRAPHS_BYTES / GIB:.1f} GiB are for graphs; a block takes {block_bytes / GIB:.4f} GiB"
        )
    return num_blocks
