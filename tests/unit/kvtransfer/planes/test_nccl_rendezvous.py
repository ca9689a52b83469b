"""kvtransfer.planes.rendezvous: c10d can use the tunnelled store from C++, and every wait on it is bounded."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from baton.kvtransfer.planes.rendezvous import MAX_KEYS, MAX_VALUE_BYTES, TunnelStore


def two_ends(timeout_s: float = 20.0) -> tuple[TunnelStore, TunnelStore]:
    ends: list[TunnelStore] = []
    one = TunnelStore(lambda key, value: ends[1].deliver(key, value), timeout_s)
    other = TunnelStore(lambda key, value: ends[0].deliver(key, value), timeout_s)
    ends += [one, other]
    return one, other


def test_a_process_group_rendezvous_over_it_moves_bytes() -> None:
    """Guards the C++ side, which calls set, get, wait and clone; gloo replaces NCCL, which needs GPUs."""
    stores = two_ends()
    got = torch.zeros(1000, dtype=torch.uint8)
    errors: list[Exception] = []

    def rank(number: int) -> None:
        try:
            group = dist.ProcessGroupGloo(dist.PrefixStore("way", stores[number]), number, 2, timedelta(seconds=20))
            data = torch.arange(1000).to(torch.uint8)
            (group.send([data], 1, 0) if number == 0 else group.recv([got], 0, 0)).wait()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and got.equal(torch.arange(1000).to(torch.uint8))
    assert not dist.is_initialized()


def test_a_wait_ends_on_timeout_and_on_close() -> None:
    store = TunnelStore(lambda key, value: None, 0.01)
    with pytest.raises(TimeoutError):
        store.get("never")
    patient = TunnelStore(lambda key, value: None, 60.0)
    threading.Timer(0.01, patient.shut).start()
    with pytest.raises(TimeoutError):
        patient.wait(["never"], timedelta(seconds=60))


def test_what_one_end_sets_the_other_reads() -> None:
    one, other = two_ends()
    one.set("k", b"\x00\xff")
    assert other.get("k") == b"\x00\xff" and other.check(["k"]) and not other.check(["k", "l"])
    assert other.delete_key("k") and one.check(["k"])


def test_the_memory_that_a_peer_can_use_is_bounded() -> None:
    store = TunnelStore(lambda key, value: None, 1.0)
    for number in range(MAX_KEYS + 10):
        store.deliver(str(number), b"")
    assert store.num_keys() == MAX_KEYS
    with pytest.raises(ValueError):
        store.set("k", bytes(MAX_VALUE_BYTES + 1))
