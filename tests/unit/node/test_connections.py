"""node.connections: a name belongs to the first connection that states it, and what is remembered is bounded."""

from __future__ import annotations

import pytest

from baton.node.connections import NameHolders, NameTaken, connection_id, stated_name

SECRET = b"s" * 16


def heard(holders: NameHolders, connection: bytes) -> str:
    """The name under which a message came over a connection."""
    return (holders.find(connection) or holders.learn(connection, None)).name


def test_a_peer_has_one_id_at_one_address() -> None:
    """Guards reconnecting (the same id again), and the id against the other addresses that a peer connects to."""
    first = connection_id("d/1", SECRET, "tcp://a:1")
    assert first == connection_id("d/1", SECRET, "tcp://a:1")
    assert first != connection_id("d/1", SECRET, "tcp://b:1")
    assert first != connection_id("d/1", b"t" * 16, "tcp://a:1")
    assert stated_name(first.encode()) == "d/1"


def test_a_name_may_hold_the_mark() -> None:
    """Guards a worker that is called so: the suffix begins at the last mark."""
    assert stated_name(connection_id("a#b/1", SECRET, "tcp://a:1").encode()) == "a#b/1"


def test_the_first_connection_keeps_the_name() -> None:
    """Guards a member against a later connection under its name."""
    holders = NameHolders()
    assert holders.connection_of("d/1") is None
    assert heard(holders, b"d/1#00") == "d/1"
    with pytest.raises(NameTaken):
        heard(holders, b"d/1#01")
    assert heard(holders, b"d/1#00") == "d/1"
    assert holders.connection_of("d/1") == b"d/1#00"


def test_a_reserved_name_is_not_taken() -> None:
    """Guards a peer that this process connects to, also where its name came in before."""
    holders = NameHolders()
    assert heard(holders, b"d/1#00") == "d/1"
    holders.reserve("d/1")
    assert holders.connection_of("d/1") is None
    with pytest.raises(NameTaken):
        heard(holders, b"d/1#00")
    holders.release("d/1")
    assert heard(holders, b"d/1#00") == "d/1"


def test_a_flood_of_names_displaces_the_silent_only() -> None:
    """Guards memory, and members, which are heard four times a second, against clients that state ever new names."""
    holders = NameHolders(limit=3)
    for number in range(10):
        assert heard(holders, b"member#00") == "member"
        heard(holders, b"%d#00" % number)
    assert [name for name in map(str, range(10)) if holders.connection_of(name)] == ["8", "9"]
    assert holders.connection_of("member") == b"member#00"


def test_an_id_that_is_no_text_is_an_error() -> None:
    """Guards the loop: the caller counts it as an invalid message."""
    with pytest.raises(UnicodeDecodeError):
        heard(NameHolders(), b"\xff\xfe")
