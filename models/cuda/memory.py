"""The KV pool of a GPU: how far apart its units lie, and how many blocks there are. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.errors import SettingsError

GIB = 1 << 30
GRAPHS_BYTES = 3 * GIB // 2
"""Kept for captured graphs, libraries' workspaces and the buffers of communicators, which come after the pool."""

CONTEXT_BYTES = 3 * GIB // 4
"""What a process uses of a GPU beside its own allocations: the context of CUDA, and the code of kernels."""
MAX_SPARE = 0.05
"""Share of a GPU that stays free beside what is planned, so that an estimate that is too low does no harm."""

STACKS = 5
"""Of memory, which an H100 has."""


def unit_padding(num_layers: int, layer_bytes: int, data_bytes: int) -> int:
    """Bytes behind each unit of a pool: those of a layer, if a unit's layers are a multiple of five; else none. Where
    scales make a layer's bytes such a multiple, those of its data.

    Without it one layer of all units lies on few of the five stacks, and attention reads at a fraction of the speed
    (docs/benchmarks/kernels.md). Other GPUs do as the H100 does, since units go from one to the other.
    """
    if layer_bytes % STACKS == 0 and data_bytes % STACKS:
        return data_bytes
    return layer_bytes if num_layers % STACKS == 0 else 0


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of one GPU, once a worker's weights and activations have their place."""

    total_bytes: int
    free_bytes: int
    """What no process uses at this moment."""
    own_bytes: int
    """What this process has allocated."""


def plan_blocks(memory: GpuMemory, utilization: float, block_bytes: int) -> int:
    """Blocks of the largest pool with which this worker uses at most `utilization` of the GPU; SettingsError if none.

    The plan starts from the total, since what is free changes while other workers of the same GPU start. What is free
    is only an upper bound: memory that a foreign program holds cannot be used.
    """
    budget = int(memory.total_bytes * utilization) - memory.own_bytes - CONTEXT_BYTES
    spare = int(memory.total_bytes * min(1.0 - utilization, MAX_SPARE))
    num_blocks = (min(budget, memory.free_bytes - spare) - GRAPHS_BYTES) // block_bytes
    if num_blocks < 2:
        raise SettingsError(
            f"no memory for a KV pool: this worker may use {memory.total_bytes * utilization / GIB:.1f} of "
            f"{memory.total_bytes / GIB:.1f} GiB (--gpu-memory-utilization {utilization}), "
            f"{memory.free_bytes / GIB:.1f} GiB are free, the model takes {memory.own_bytes / GIB:.1f} GiB, and "
            f"{(GRAPHS_BYTES + CONTEXT_BYTES) / GIB:.1f} GiB are for graphs and CUDA; a block takes "
            f"{block_bytes / GIB:.4f} GiB"
        )
    return num_blocks
