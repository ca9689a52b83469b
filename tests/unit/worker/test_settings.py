"""Sizes that are left to the device, and those that are not."""

from __future__ import annotations

import pytest

from baton.decode.settings import DecodeSettings
from baton.prefill.settings import PrefillSettings


@pytest.mark.parametrize("kind", [DecodeSettings, PrefillSettings])
def test_what_is_left_to_the_device_is_filled_in(kind):
    """Guards against a loop that runs with a size of 0, and against a device that overrules its user."""
    cpu, gpu = kind().for_device("cpu"), kind().for_device("cuda")
    assert (cpu.block_tokens, gpu.block_tokens) == (16, 64)
    assert (cpu.plane[0], gpu.plane[0]) == ("shm", "cuda_ipc")
    for settings in (cpu, gpu):
        sizes = (settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_chunk_tokens, settings.chunk_mib)
        assert all(size > 0 for size in sizes)
    assert cpu.kv_memory_gib == 0.5 and gpu.kv_memory_gib == 0.0, "on a GPU the pool is planned from what is free"
    chosen = kind(block_tokens=32, max_chunk_tokens=7, plane=("zmq",))
    for device in ("cpu", "cuda"):
        filled = chosen.for_device(device)
        assert (filled.block_tokens, filled.max_chunk_tokens, filled.plane) == (32, 7, ("zmq",))
