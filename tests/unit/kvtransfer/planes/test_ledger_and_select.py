"""kvtransfer.planes.ledger and the choice of a plane."""

from __future__ import annotations

import pytest

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey, IoDone, choose
from baton.kvtransfer.planes.ledger import IoLedger, check_posting
from baton.kvtransfer.planes.shm import ShmPlane
from baton.node.errors import InvariantBroken
from baton.node.host import host_identity
from baton.node.messages.transfer import PlaneAddress
from baton.testing.loopback import LoopbackFabric

A, B = ChunkKey(b"a" * 16, 0, 0), ChunkKey(b"b" * 16, 0, 0)


def test_ended_operations_are_reported_once() -> None:
    ledger = IoLedger()
    ledger.post_receive("p", A, [1])
    ledger.end_receive(A)
    ledger.end_send(B, "broken")
    assert ledger.report() == [IoDone(A, False, True), IoDone(B, True, False, "broken")]
    assert ledger.report() == []


def test_cancelled_operations_are_not_reported() -> None:
    ledger = IoLedger()
    ledger.post_receive("p", A, [1])
    ledger.end_receive(A)
    ledger.post_receive("p", A._replace(seq=1), [2])
    ledger.post_receive("p", B, [3])
    ledger.cancel(A.transfer_id)
    assert ledger.report() == [] and not ledger.receiving(A.transfer_id) and ledger.receiving(B.transfer_id)


def test_forgetting_a_peer_fails_its_receives_only() -> None:
    ledger = IoLedger()
    ledger.post_receive("p", A, [1])
    ledger.post_receive("q", B, [2])
    ledger.forget("p")
    assert [(done.key, done.ok) for done in ledger.report()] == [(A, False)]
    assert ledger.receive(B) is not None


def test_a_key_is_posted_once_at_a_time() -> None:
    ledger = IoLedger()
    ledger.post_receive("p", A, [1])
    with pytest.raises(InvariantBroken):
        ledger.post_receive("p", A, [2])


@pytest.mark.parametrize(("blocks", "source"), [([], None), ([0], [0, 1]), ([0, 4], [0, 0]), ([-1], None)])
def test_impossible_postings_are_bugs(blocks: list[int], source: list[int] | None) -> None:
    with pytest.raises(InvariantBroken):
        check_posting(4, blocks, source)


def test_the_first_own_plane_that_reaches_the_peer_is_chosen() -> None:
    """Guards the order of preference: a peer must not force a slow plane by the order of its list."""
    memory = HostMemory(1, 16)
    shm, loopback = ShmPlane(memory), LoopbackFabric().plane("me", memory)
    both = (loopback.describe(), shm.describe())
    assert choose((shm, loopback), both) is shm
    assert choose((loopback, shm), both) is loopback
    far = PlaneAddress(plane="shm", host="another-host", address=shm.describe().address)
    assert choose((shm, loopback), (far, loopback.describe())) is loopback
    assert choose((shm,), (far, PlaneAddress(plane="nccl", host=host_identity()))) is None
    assert choose((), both) is None
    memory.close()


def test_the_host_identity_is_stable_and_fits_the_message() -> None:
    assert host_identity() == host_identity()
    assert 1 <= len(host_identity()) <= 96
