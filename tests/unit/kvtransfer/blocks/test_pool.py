"""Guards the memory of blocks: views and tensor are the same bytes, and nothing outlives `close`."""

from __future__ import annotations

import gc
import mmap
import os
import random
import sys

import pytest
import torch
import xxhash

from baton.kvtransfer.blocks.layout import DTYPE_BYTES, KVLayout
from baton.kvtransfer.blocks.memory import HostMemory, SharedFile, SharedReader
from baton.kvtransfer.blocks.pool import BlockPool
from baton.node.errors import InvariantBroken, PeerLost

LAYOUT = KVLayout.of_model(num_layers=3, kv_heads=2, head_dim=5, block_tokens=7, dtype="bfloat16")
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux")


@pytest.fixture
def pool():
    pool = BlockPool(LAYOUT, 6)
    yield pool
    pool.close()


def test_a_new_pool_is_zero(pool: BlockPool) -> None:
    assert pool.tensor.shape == (6, 2, 3, 2, 7, 5)
    assert not pool.tensor.view(torch.uint8).any()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_a_block_is_the_same_bytes_as_its_row_of_the_tensor(dtype: str) -> None:
    pool = BlockPool(KVLayout(3, 0, 2, 2, 5, 7, dtype), 4)
    data = random.Random(1).randbytes(pool.block_bytes)
    pool.write(2, data)
    assert bytes(pool.tensor[2].reshape(-1).view(torch.uint8).numpy()) == data
    pool.tensor[3].copy_(pool.tensor[2])
    assert bytes(pool.block(3)) == bytes(pool.block(2)) == data
    assert not any(pool.block(1))
    pool.close()


def test_the_digest_is_xxh3_over_the_sums_of_the_units_in_order(pool: BlockPool) -> None:
    random_bytes = random.Random(2)
    for index in range(6):
        pool.write(index, random_bytes.randbytes(pool.block_bytes))
    half = pool.block_bytes // 2
    units = [pool.block(block)[start : start + half] for block in (4, 1) for start in (0, half)]
    expected = xxhash.xxh3_128_digest(b"".join(map(xxhash.xxh3_128_digest, units)))
    assert pool.digest([4, 1]) == expected
    assert pool.digest([1, 4]) != expected
    pool.block(1)[-1] ^= 1
    assert pool.digest([4, 1]) != expected


def test_the_digest_covers_scales() -> None:
    """Guards against a scale that is damaged on its way: all numbers of a key would be wrong by it."""
    pool = BlockPool(KVLayout(3, 0, 2, 2, 8, 7, "float8_e4m3fn", scales="token"), 4)
    assert pool.scales is not None and pool.scales.shape == (4, 2, 3, 2, 7)
    before = pool.digest([2])
    pool.scales[2, 1, 2, 1, 6] = 0.5
    assert pool.digest([2]) != before and pool.digest([1]) == pool.digest([3])
    pool.close()


@pytest.mark.parametrize("index", [-1, 6])
def test_a_block_out_of_the_pool_is_refused(pool: BlockPool, index: int) -> None:
    """Guards against a negative index, which would silently be another block."""
    with pytest.raises(InvariantBroken):
        pool.block(index)


def test_a_write_of_another_size_is_refused(pool: BlockPool) -> None:
    with pytest.raises(ValueError):
        pool.write(0, b"x" * (pool.block_bytes + 1))


def test_a_closed_pool_is_refused_but_old_views_stay_valid() -> None:
    """Guards against a segmentation fault by unmapping memory under a live tensor."""
    pool = BlockPool(LAYOUT, 2)
    pool.tensor.fill_(1.0)
    old, view = pool.tensor, pool.block(1)
    pool.close()
    pool.close()
    assert old.eq(1.0).all() and bytes(view[:2]) == b"\x80\x3f"
    with pytest.raises(InvariantBroken):
        _ = pool.tensor
    with pytest.raises(InvariantBroken):
        pool.block(0)


@linux
def test_close_leaves_no_descriptor_and_no_mapping() -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), maps.read().count("baton-kv")

    before = held()
    pool = BlockPool(LAYOUT, 2)
    assert pool.shared is not None
    reader = SharedReader(os.getpid(), pool.shared)
    assert held() != before
    reader.close()
    pool.close()
    assert held() == before


@linux
def test_a_reader_sees_the_blocks_and_cannot_write(pool: BlockPool) -> None:
    assert pool.shared is not None
    reader = SharedReader(os.getpid(), pool.shared)
    pool.write(5, b"\x5a" * pool.block_bytes)
    assert reader.block(5, pool.block_bytes) == pool.block(5)
    with pytest.raises(TypeError):
        reader.block(5, pool.block_bytes)[0] = 1
    for beyond in (-1, 1000):
        with pytest.raises(PeerLost):
            reader.block(beyond, pool.block_bytes)
    reader.close()
    with pytest.raises(InvariantBroken):
        reader.block(5, pool.block_bytes)


@linux
def test_a_reader_refuses_memory_that_does_not_match_its_description(pool: BlockPool) -> None:
    """Guards against reading foreign data: after a restart, pid and descriptor may name another file."""
    shared, pid = pool.shared, os.getpid()
    assert shared is not None
    pipe_read, pipe_write = os.pipe()
    plain = os.memfd_create("plain")
    os.ftruncate(plain, shared.size_bytes)
    os.pwrite(
        plain, shared.nonce, shared.size_bytes - mmap.PAGESIZE
    )  # everything matches but the seals: the owner could truncate it
    before = len(os.listdir("/proc/self/fd"))
    for wrong_pid, wrong in [
        (pid, shared._replace(nonce=b"\0" * 16)),
        (pid, shared._replace(size_bytes=shared.size_bytes + mmap.PAGESIZE)),
        (pid, shared._replace(size_bytes=0)),
        (pid, shared._replace(size_bytes=17)),
        (pid, SharedFile(pipe_read, shared.size_bytes, shared.nonce)),
        (pid, SharedFile(plain, shared.size_bytes, shared.nonce)),
        (pid, SharedFile(999_999, shared.size_bytes, shared.nonce)),
        (pid, shared._replace(fd=-1)),
        (2**22 + 1, shared),
        (0, shared),
        (-1, shared),
    ]:
        with pytest.raises(PeerLost):
            SharedReader(wrong_pid, wrong)
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in (pipe_read, pipe_write, plain):
        os.close(fd)


@linux
def test_the_memory_cannot_be_truncated(pool: BlockPool) -> None:
    """Guards readers against SIGBUS, which a truncated mapping raises."""
    assert pool.shared is not None
    with pytest.raises(PermissionError):
        os.ftruncate(pool.shared.fd, 4096)


def test_without_memfd_the_memory_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    memory = HostMemory(2, 50)
    assert memory.shared is None
    memory.block(1)[49] = 7
    assert bytes(memory.view[98:]) == b"\0\7"
    memory.close()
