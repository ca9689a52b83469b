"""Attached workers and their open requests."""

from __future__ import annotations

import pytest

from baton.kvtransfer.store import members as module
from baton.kvtransfer.store.arena_index import Holder, Key
from baton.kvtransfer.store.members import LEASE_S, Members, OpenRequest


@pytest.fixture
def members() -> Members:
    members = Members()
    for peer in ("a", "b"):
        assert members.attach(peer, b"n", 0.0)
    return members


def request() -> OpenRequest:
    return OpenRequest((), 0, {})


def test_a_number_in_use_is_not_opened_again(members: Members) -> None:
    """Guards against a lookup whose slots are held under the name of another."""
    first = request()
    assert members.open(Holder("a", 1), first) and not members.open(Holder("a", 1), request())
    assert members.request(Holder("a", 1)) is first and members.request(Holder("b", 1)) is None
    assert members.open(Holder("b", 1), request())


def test_open_requests_of_a_worker_are_bounded_and_closing_makes_room(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the store's memory against one worker, and the count against a request that is closed twice."""
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    assert [members.open(Holder("a", number), request()) for number in range(3)] == [True, True, False]
    members.close(Holder("a", 0))
    members.close(Holder("a", 0))
    assert [members.open(Holder("a", number), request()) for number in (3, 4)] == [True, False]


def test_blocks_of_open_requests_are_bounded(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the store's memory: 4096 lookups of 65536 blocks would take gigabytes."""
    monkeypatch.setattr(module, "MAX_OPEN_BLOCKS", 4)
    monkeypatch.setattr(module, "MAX_BLOCKS_OF_ALL", 6)
    three = OpenRequest(tuple(Key(b"n", bytes([number])) for number in range(3)), 0, {})
    assert [members.open(Holder("a", number), three) for number in range(2)] == [True, False]
    assert [members.open(Holder("b", number), three) for number in range(2)] == [True, False]
    members.attach("c", b"n", 0.0)
    assert not members.open(Holder("c", 0), three)
    members.close(Holder("a", 0))
    assert members.open(Holder("c", 0), three)
    members.detach("b")
    members.detach("c")
    assert members.open(Holder("a", 5), three)


def test_a_worker_that_attaches_again_has_nothing_open(members: Members) -> None:
    """Guards against a restarted worker that gets answers of its former life."""
    for peer in ("a", "b"):
        members.open(Holder(peer, 1), request())
    assert not members.attach("a", b"n", 1.0)
    assert members.request(Holder("a", 1)) is None and members.request(Holder("b", 1)) is not None
    assert members.open(Holder("a", 1), request())
    members.detach("a")
    assert members.request(Holder("a", 1)) is None and len(members) == 1


def test_a_worker_is_silent_after_its_lease(members: Members) -> None:
    """Guards slots that a dead worker holds."""
    member = members.get("a")
    assert member is not None
    member.last_seen_at = 1.0
    assert members.silent(LEASE_S) == [] and members.silent(LEASE_S + 1.0) == ["b"]


def test_a_full_store_still_takes_workers_that_attach_again(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the bound on workers, and a restart at it."""
    monkeypatch.setattr(module, "MAX_MEMBERS", 2)
    assert members.has_room("a") and not members.has_room("c")
