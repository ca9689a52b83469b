"""kvtransfer.protocol.pairs: greetings over links that lose messages or are cut, without a transfer."""

from __future__ import annotations

import random
from collections import deque

import pytest

from baton.kvtransfer.protocol import pairs as module
from baton.kvtransfer.protocol.pairs import (
    GREET_AGAIN_S,
    MAX_GREETINGS,
    PAIR_IDLE_S,
    PROBE_S,
    Pairs,
    PeerTransport,
)
from baton.node.errors import SettingsError
from baton.node.messages.base import Message
from baton.node.messages.transfer import Hello, Welcome
from baton.testing.loopback import LoopbackFabric

STEP_S = 0.05
NOTICED_S = PROBE_S + (MAX_GREETINGS + 1) * GREET_AGAIN_S + STEP_S
"""From the cut of a link to the moment at which its peer counts as silent, at most."""


class Link:
    """A prefill worker's pairs with one decode worker, over a link that loses a part of the messages."""

    def __init__(self, seed: int = 0, loss: float = 0.0) -> None:
        self.now, self.cut, self.num_hellos = 0.0, False, 0
        self._random, self._loss = random.Random(seed), loss
        self._queue: deque[tuple[str, Message]] = deque()
        fabric = LoopbackFabric()
        self.prefill, self.decode = (
            Pairs(name, b"n" * 32, [fabric.plane(name, None)], self._transport())  # type: ignore[arg-type]
            for name in ("p/1", "d/1")
        )
        self.silenced: list[str] = []

    def _transport(self) -> PeerTransport:
        return PeerTransport(self._send, lambda peer, address: None, lambda peer: None)

    def _send(self, peer: str, message: Message) -> bool:
        self.num_hellos += isinstance(message, Hello)
        if not self.cut and self._random.random() >= self._loss:
            self._queue.append((peer, message))
        return True

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += STEP_S
            self.silenced += self.prefill.tend(self.now)
            assert self.decode.tend(self.now) == []
            while self._queue:
                _, message = self._queue.popleft()
                if isinstance(message, Hello):
                    assert self.decode.on_hello("p/1", message, self.now)
                elif isinstance(message, Welcome):
                    assert self.prefill.on_welcome("d/1", message, self.now)


def used(seed: int = 0, loss: float = 0.0) -> Link:
    """A link over which one transfer was opened."""
    link = Link(seed, loss)
    link.prefill.greet("d/1", "tcp://d", 0.0)
    link.run(1.0)
    return link


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_of_an_idle_link_is_noticed_and_so_is_its_end(seed: int) -> None:
    """Guards the first request after a cut: it waited for its transfer to stall."""
    link = used(seed, loss=0.3)
    link.run(random.Random(seed).uniform(0.0, 20.0))
    assert link.prefill.silent() == ()
    link.cut = True
    link.run(NOTICED_S)
    assert link.prefill.silent() == ("d/1",) and link.silenced == ["d/1"]
    link.cut = False
    link.run(NOTICED_S)
    assert link.prefill.silent() == ()


def test_an_idle_pair_is_probed_until_it_is_forgotten() -> None:
    """Guards the network against probes of pairs that nothing uses, and against more of them than one in PROBE_S."""
    link = used()
    link.run(PAIR_IDLE_S)
    assert link.num_hellos <= 1 + (PAIR_IDLE_S + 1.0) / PROBE_S
    assert link.prefill.idle(link.now) == ["d/1"] and link.decode.idle(link.now) == []
    link.prefill.forget("d/1")
    num_hellos = link.num_hellos
    link.run(PAIR_IDLE_S + PROBE_S)
    assert link.num_hellos == num_hellos and link.decode.idle(link.now) == ["p/1"]


def test_workers_that_met_stay_a_pair_until_one_is_silent() -> None:
    """Guards the first hand-over of mixed workers, minutes after they have joined: it need not wait for a greeting."""
    link = Link()
    link.prefill.meet("d/1", "tcp://d", 0.0)
    link.run(2 * PAIR_IDLE_S)
    assert link.prefill.plane_of("d/1") is not None and link.decode.plane_of("p/1") is not None
    assert link.prefill.idle(link.now) == link.decode.idle(link.now) == []
    link.cut = True
    link.run(NOTICED_S)
    assert link.silenced == ["d/1"] and link.prefill.idle(link.now) == ["d/1"]


def test_a_peer_that_never_answers_is_greeted_again_and_again_in_bounded_numbers() -> None:
    """Guards against a storm of greetings to a peer that is gone."""
    link = Link()
    link.cut = True
    link.prefill.greet("d/1", "tcp://d", 0.0)
    link.run(60.0)
    series_s = PROBE_S + MAX_GREETINGS * GREET_AGAIN_S
    assert MAX_GREETINGS < link.num_hellos <= MAX_GREETINGS * (60.0 / series_s + 1)
    assert len(link.silenced) <= 60.0 / series_s + 1


@pytest.fixture
def pairs() -> Pairs:
    """Of a worker that can open links to addresses of TCP only."""

    def connect(peer: str, address: str) -> None:
        if not address.startswith("tcp://"):
            raise SettingsError(f"cannot connect to {address!r}")

    return Pairs("p/1", b"n" * 32, [], PeerTransport(lambda *_: True, connect, lambda peer: None))


def test_a_peer_without_an_address_makes_no_pair(pairs: Pairs) -> None:
    """Guards a worker's I/O thread: the pair was greeted again from there, where the error ended the worker."""
    with pytest.raises(SettingsError, match="nonsense"):
        pairs.greet("d/1", "nonsense", 0.0)
    for turn in range(100):
        assert pairs.tend(turn * GREET_AGAIN_S) == []
    pairs.greet("d/1", "tcp://127.0.0.1:1", 100.0)
    assert pairs.due_at < float("inf")


def test_pairs_of_the_sending_side_are_bounded_too(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a worker against orders to send to ever new peers."""
    monkeypatch.setattr(module, "MAX_PAIRS", 2)
    for number in range(2):
        pairs.greet(f"d/{number}", "tcp://127.0.0.1:1", 0.0)
    with pytest.raises(SettingsError, match="too many"):
        pairs.greet("d/2", "tcp://127.0.0.1:1", 0.0)
    pairs.greet("d/1", "tcp://127.0.0.1:1", 1.0)


def test_two_workers_that_greet_each_other_are_one_pair() -> None:
    """Mixed workers send both ways: a greeting from the other must not undo what was agreed, or forget its address."""
    link = Link()
    link.prefill.greet("d/1", "tcp://d", link.now)
    link.run(1.0)
    link.decode.greet("p/1", "tcp://p", link.now)
    assert link.decode.plane_of("p/1") is not None
    pair = link.decode._pairs["p/1"]
    assert pair.address == "tcp://p" and pair.plane is not None
    hello = Hello(worker="p/1", namespace=b"n" * 32, planes=(LoopbackFabric().plane("p/1", None).describe(),))
    assert link.decode.on_hello("p/1", hello, link.now)
    assert link.decode._pairs["p/1"].address == "tcp://p"
