"""node.membership: a worker registers until answered, sends heartbeats, and registers again with a lost proxy."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from baton.node.membership import HEARTBEAT_S, OLDER_AFTER_S, PROXY_LEASE_S, Joined, JoinRefused, Membership, ProxyLost
from baton.node.messages.base import PROTOCOL_VERSION
from baton.node.messages.control import Goodbye, Heartbeat, Load, Ping, Refused, Register, Registered, Rejoin
from baton.node.messages.versions import OLDEST_VERSION

REGISTER = Register(
    worker="d",
    incarnation=1,
    role="decode",
    model="m",
    namespace=b"n" * 32,
    block_tokens=16,
    total_blocks=5,
    max_num_seqs=8,
    max_model_len=512,
    address="tcp://x",
    revision="blue",
)


REFUSED = Refused(reason="no", version=PROTOCOL_VERSION)


def _due(membership: Membership, now: float) -> list[type]:
    messages, _ = membership.on_timer(now, Load())
    return [type(message) for _, message in messages]


def _joined(now: float = 0.0) -> Membership:
    membership = Membership(REGISTER, ("a",), now)
    assert membership.on_message("a", Registered(proxy="proxy", incarnation=7), now) == [Joined("a")]
    return membership


def test_registers_until_answered_then_sends_heartbeats() -> None:
    """Guards against a lost Register, and against heartbeats before the registration is accepted."""
    membership = Membership(REGISTER, ("a",), 0.0)
    assert _due(membership, 0.0) == [Register]
    assert _due(membership, HEARTBEAT_S / 2) == []
    assert _due(membership, HEARTBEAT_S) == [Register]
    membership.on_message("a", Registered(proxy="proxy", incarnation=7), 0.3)
    assert _due(membership, 2 * HEARTBEAT_S) == [Heartbeat]


def test_a_silent_proxy_is_lost_and_registered_with_again() -> None:
    """Guards orphaned requests: after the session lease they are dropped, and the worker registers again."""
    membership = _joined()
    _, changes = membership.on_timer(PROXY_LEASE_S + 0.1, Load())
    assert changes == [ProxyLost("a")]
    assert _due(membership, PROXY_LEASE_S + 0.1 + HEARTBEAT_S) == [Register]


def test_pings_keep_the_proxy() -> None:
    """Guards against dropping the requests of an idle proxy."""
    membership = _joined()
    for tenth in range(100):
        membership.on_message("a", Ping(proxy="proxy", incarnation=7), tenth / 10)
        _, changes = membership.on_timer(tenth / 10, Load())
        assert changes == []


def test_a_restarted_proxy_is_detected_at_once() -> None:
    """Guards against computing requests that a restarted proxy has lost."""
    assert _joined().on_message("a", Ping(proxy="proxy", incarnation=8), 0.1) == [ProxyLost("a")]
    assert _joined().on_message("a", Rejoin(), 0.1) == [ProxyLost("a")]
    changes = _joined().on_message("a", Registered(proxy="proxy", incarnation=8), 0.1)
    assert changes == [ProxyLost("a"), Joined("a")]


def test_a_refused_worker_registers_again_after_longer_and_longer_pauses() -> None:
    """Guards a worker that one refusal ended, and the proxy against a storm of registrations that it refuses."""
    membership = Membership(REGISTER, ("a",), 0.0)
    now, pauses = 0.0, []
    for _ in range(7):
        assert _due(membership, now) == [Register]
        (change,) = membership.on_message("a", REFUSED, now)
        assert isinstance(change, JoinRefused) and change.reason == "no"
        pauses.append(change.pause_s)
        assert _due(membership, now + change.pause_s - 0.01) == []
        now = membership.wake_at
    assert pauses == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    assert membership.on_message("a", Registered(proxy="proxy", incarnation=7), now) == [Joined("a")]
    assert _due(membership, now) == [Heartbeat]


def test_refusals_of_retransmitted_registers_count_once() -> None:
    """Guards the pause: a slow proxy answers every Register that was sent before its first answer."""
    membership = Membership(REGISTER, ("a",), 0.0)
    assert membership.on_message("a", REFUSED, 0.0) == [JoinRefused("a", "no", 1.0)]
    assert membership.on_message("a", REFUSED, 0.1) == []
    assert membership.wake_at == 1.0


def test_a_refusal_by_one_proxy_leaves_the_other() -> None:
    """Guards a worker of two proxies: the one that refuses it delays nothing at the other."""
    membership = Membership(REGISTER, ("a", "b"), 0.0)
    membership.on_message("a", REFUSED, 0.0)
    messages, _ = membership.on_timer(0.0, Load())
    assert [link for link, _ in messages] == ["b"]


def test_one_of_two_proxies_is_lost_and_the_other_stays() -> None:
    """Guards the requests of a proxy while another is silent, has restarted, or comes back."""
    membership = Membership(REGISTER, ("a", "b"), 0.0)
    for link in ("a", "b"):
        membership.on_message(link, Registered(proxy=link, incarnation=7), 0.0)
    membership.on_message("b", Ping(proxy="b", incarnation=7), PROXY_LEASE_S)
    _, changes = membership.on_timer(PROXY_LEASE_S + 0.1, Load())
    assert changes == [ProxyLost("a")] and membership.joined == ("b",)
    messages, _ = membership.on_timer(PROXY_LEASE_S + 0.1 + HEARTBEAT_S, Load())
    assert {link: type(message) for link, message in messages} == {"a": Register, "b": Heartbeat}
    joined = membership.on_message("a", Registered(proxy="a", incarnation=8), PROXY_LEASE_S + 0.5)
    assert joined == [Joined("a")] and membership.joined == ("a", "b")


def test_goodbyes_go_to_the_proxies_that_accepted_it() -> None:
    """Guards drain: every proxy that accepted the worker gets a Goodbye."""
    membership = Membership(REGISTER, ("a", "b"), 0.0)
    membership.on_message("a", Registered(proxy="proxy", incarnation=7), 0.0)
    assert membership.goodbyes() == [("a", Goodbye(worker="d", incarnation=1))]


def test_each_proxy_hears_at_once_that_the_worker_drains() -> None:
    """Guards requests that a draining worker refuses: until the next heartbeat they went there. One that joins later
    hears it with its first heartbeat."""
    membership = Membership(REGISTER, ("a", "b"), 0.0)
    membership.on_message("a", Registered(proxy="proxy", incarnation=7), 0.0)
    _due(membership, 0.0)
    membership.draining = True
    (sent,) = membership.on_timer(0.01, Load())[0]
    assert sent[0] == "a" and isinstance(sent[1], Heartbeat) and sent[1].draining
    assert _due(membership, 0.02) == []
    membership.on_message("b", Registered(proxy="proxy-1", incarnation=8), 0.03)
    assert [link for link, _ in membership.on_timer(0.03, Load())[0]] == ["b"]


def test_a_lost_message_of_the_proxy_begins_anew() -> None:
    """Guards a request whose dispatch was lost: neither end would ever speak of it again."""
    membership = _joined()
    for sent in (1, 2):
        assert membership.on_message("a", Ping(proxy="proxy", incarnation=7, sent=sent), 0.1) == []
    assert membership.on_message("a", Ping(proxy="proxy", incarnation=7, sent=4), 0.2) == [ProxyLost("a")]
    ((_, register),), _ = membership.on_timer(0.2, Load())
    assert isinstance(register, Register) and register.joins == 1
    assert membership.on_message("a", Registered(proxy="proxy", incarnation=7, sent=5), 0.3) == [Joined("a")]
    assert membership.on_message("a", Ping(proxy="proxy", incarnation=7, sent=6), 0.4) == []


def test_retransmitted_registrations_are_one() -> None:
    """Guards the requests of a worker whose registration is answered twice."""
    membership = Membership(REGISTER, ("a",), 0.0)
    registers = [membership.on_timer(turn * HEARTBEAT_S, Load())[0][0][1] for turn in range(2)]
    assert [each.joins for each in registers if isinstance(each, Register)] == [0, 0]


def test_messages_are_counted_for_their_link() -> None:
    """Guards the other direction: what a worker has sent to this proxy, and to no other peer."""
    membership = _joined()
    membership.outgoing("a", Rejoin())
    membership.outgoing("a", Rejoin())
    membership.outgoing("p/1", Rejoin())
    ((_, beat),), _ = membership.on_timer(HEARTBEAT_S, Load())
    assert isinstance(beat, Heartbeat) and beat.sent == 2


def _registers(membership: Membership, now: float) -> list[Register]:
    """Those that are due, as the proxy gets them."""
    messages = [membership.outgoing(link, message) for link, message in membership.on_timer(now, Load())[0]]
    return [message for message in messages if isinstance(message, Register)]


def test_a_proxy_of_the_version_before_is_joined() -> None:
    """Guards a worker that is replaced before its proxy, which cannot read its first messages and counts the others."""
    membership = Membership(REGISTER, ("a",), 0.0)
    assert [each.version for each in _registers(membership, 0.0)] == [PROTOCOL_VERSION]
    newer, older = _registers(membership, OLDER_AFTER_S)
    assert (newer.version, older.version) == (PROTOCOL_VERSION, OLDEST_VERSION)
    assert newer.revision == "blue" and older.revision is UNSET
    assert membership.on_message("a", Registered(proxy="proxy", incarnation=7), OLDER_AFTER_S) == [Joined("a")]
    ((_, beat),), _ = membership.on_timer(OLDER_AFTER_S + HEARTBEAT_S, Load())
    assert isinstance(beat, Heartbeat) and beat.sent == 2
    assert membership.outgoing("a", beat).orphaned is UNSET  # type: ignore[attr-defined]


def test_a_mixed_worker_waits_for_a_proxy_of_this_version() -> None:
    """Guards the registration of a worker with a role that a proxy of the version before does not know."""
    membership = Membership(replace(REGISTER, role="mixed"), ("a",), 0.0)
    for now in (0.0, OLDER_AFTER_S):
        assert [each.version for each in _registers(membership, now)] == [PROTOCOL_VERSION]


def test_a_proxy_that_was_replaced_is_spoken_to_in_its_version() -> None:
    """Guards what only the new version has, such as the revision, when the proxy is the last that is replaced."""
    membership = _joined()
    assert membership.on_message("a", Ping(proxy="proxy", incarnation=8), 5.0) == [ProxyLost("a")]
    (register,) = _registers(membership, 5.0)
    assert register.version == PROTOCOL_VERSION and register.revision == "blue"
    membership.on_message("a", Registered(proxy="proxy", incarnation=8, version=PROTOCOL_VERSION), 5.0)
    ((_, beat),), _ = membership.on_timer(5.0 + HEARTBEAT_S, Load())
    assert membership.outgoing("a", beat) == beat


def test_a_refusal_of_a_version_is_answered_in_an_older_one() -> None:
    """Guards a worker of the next version: a proxy of this one can read its registration, and refuses the version."""
    membership = Membership(REGISTER, ("a",), 0.0)
    _registers(membership, 0.0)
    assert membership.on_message("a", Refused(reason="version", version=OLDEST_VERSION), 0.1) == []
    assert [each.version for each in _registers(membership, 0.1)] == [OLDEST_VERSION]
    refused = membership.on_message("a", Refused(reason="another model", version=OLDEST_VERSION), 0.2)
    assert refused == [JoinRefused("a", "another model", 1.0)]
    assert [each.version for each in _registers(membership, 1.2)] == [PROTOCOL_VERSION]
