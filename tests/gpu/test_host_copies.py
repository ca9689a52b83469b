"""Copies between a GPU's blocks and host memory."""

from __future__ import annotations

import time

import pytest
import torch

from node.errors import InvariantBroken

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]

BLOCK_BYTES, NUM_BLOCKS = 1 << 20, 12


def wait(copies, copy: int) -> None:
    deadline = time.monotonic() + 20
    while not copies.ended(copy):
        assert time.monotonic() < deadline, "the copy does not end"


@pytest.mark.parametrize("locked", [True, False])
def test_blocks_go_to_the_host_and_come_back(locked):
    """Guards runs that are cut or joined wrongly, bytes of other blocks, and memory that is not locked."""
    from kvtransfer.blocks.device_pool import DeviceMemory
    from kvtransfer.blocks.memory import HostMemory
    from kvtransfer.planes.host_copies import DeviceCopies

    memory, host = DeviceMemory(NUM_BLOCKS, BLOCK_BYTES, 0), HostMemory(NUM_BLOCKS, BLOCK_BYTES)
    memory.data.random_(0, 256)
    torch.cuda.synchronize()
    before = memory.data.cpu()
    copies = DeviceCopies(memory)
    if locked:
        copies.lock(host.view)
    chosen, into = [3, 4, 5, 9, 0, 1], [2, 7, 8, 11, 10, 6]
    there = host.view[: len(chosen) * BLOCK_BYTES]
    wait(copies, copies.to_host(chosen, there))
    assert bytes(there) == before[chosen].numpy().tobytes()
    wait(copies, copies.to_device(there, into))
    expected = before.clone()
    expected[into] = before[chosen]
    assert torch.equal(memory.data.cpu(), expected)
    for blocks, view in (([NUM_BLOCKS], there[:BLOCK_BYTES]), ([0, 1], there[:BLOCK_BYTES])):
        with pytest.raises(InvariantBroken):
            copies.to_host(blocks, view)
    copies.close()
    copies.close()
    del there
    host.close()
    memory.close()
