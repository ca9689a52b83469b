"""Which workers pair over which data plane: greetings, refusals, and forgetting.

The worker that sends greets (Hello, with the planes it offers), the other chooses one and answers (Welcome), or says
why not (Refused). Of two mixed workers each may greet the other; they are one pair.
A pair of different namespaces is never made. The sender greets again every PROBE_S while a pair is idle, until the pair
is forgotten: a peer that does not answer is silent, and known to be before a prompt is computed for it. This probes the
link for messages; bytes that do not move are noticed by the transfer that waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from baton.kvtransfer.planes.base import Plane, choose
from baton.kvtransfer.protocol.receiver import Landings
from baton.node.errors import SettingsError
from baton.node.messages.base import Message
from baton.node.messages.control import Refused
from baton.node.messages.transfer import TRANSFER_VERSION, Hello, Welcome

GREET_AGAIN_S = 0.25
MAX_GREETINGS = 12
"""A peer that answers none of so many in a row, over three seconds, cannot be reached."""
GREETING_LASTS_S = 1.0
PROBE_S = 5.0
"""Between two greetings of an idle pair: N x M pairs send so many small messages in this time, and get as many."""
MAX_PAIRS = 4096
PAIR_IDLE_S = 120.0
"""A pair that no transfer has used for so long is forgotten; the next one makes it again."""


@dataclass(frozen=True, slots=True)
class PeerTransport:
    """How peers are reached: `send` returns whether the peer could be reached, `connect` opens a link to it, or raises
    SettingsError for no address, or where the process may open no more files."""

    send: Callable[[str, Message], bool]
    connect: Callable[[str, str], None]
    disconnect: Callable[[str], None]


@dataclass(slots=True)
class _Pair:
    peer: str
    address: str = ""
    plane: Plane | None = None
    greeted_at: float = float("-inf")
    welcomed_at: float = float("-inf")
    num_unanswered: int = 0
    """Greetings since the last answer."""
    silent: bool = False
    """The last MAX_GREETINGS had no answer."""
    kept: bool = False
    """Not forgotten while it is idle, until the peer is silent."""
    used_at: float = float("-inf")
    """Of this end: when a transfer was opened; of the other, which cannot tell a probe from that: the last greeting."""
    landings: Landings = field(default_factory=Landings)

    @property
    def due_at(self) -> float:
        """When to greet again; only the end that has the other's address does."""
        if not self.address:
            return float("inf")
        return self.greeted_at + (GREET_AGAIN_S if self.num_unanswered else PROBE_S)


class Pairs:
    """All pairs of one worker. `planes` come in the order of preference."""

    def __init__(self, identity: str, namespace: bytes, planes: Sequence[Plane], wire: PeerTransport) -> None:
        self._identity = identity
        self._namespace = namespace
        self._planes = tuple(planes)
        self._wire = wire
        self._pairs: dict[str, _Pair] = {}
        self.due_at = float("inf")
        """When `tend` has something to do."""

    def plane_of(self, peer: str) -> Plane | None:
        """None until both sides have agreed."""
        pair = self._pairs.get(peer)
        return pair.plane if pair is not None else None

    def landings(self, peer: str) -> Landings:
        """What has landed from it since the pair was made."""
        pair = self._pairs.get(peer)
        return pair.landings if pair is not None else Landings()

    def greet(self, peer: str, address: str, now: float) -> None:
        """Say hello, unless that was done or answered a moment ago. Raises SettingsError where no link can be opened
        or there are too many pairs; then there is no pair."""
        pair = self._pairs.get(peer) or self._new_pair(peer, address)
        pair.address = address  # the peer may have made the pair, to send to this worker
        pair.used_at = now
        if now - pair.welcomed_at >= GREETING_LASTS_S and now - pair.greeted_at >= GREET_AGAIN_S:
            self._say_hello(pair, now)

    def meet(self, peer: str, address: str, now: float) -> None:
        """As `greet`, long before a transfer: the pair is kept, so that the first one need not wait for it."""
        self.greet(peer, address, now)
        self._pairs[peer].kept = True

    def _new_pair(self, peer: str, address: str) -> _Pair:
        if len(self._pairs) >= MAX_PAIRS:
            raise SettingsError("too many pairs")
        self._wire.connect(peer, address)
        pair = self._pairs[peer] = _Pair(peer, address)
        return pair

    def tend(self, now: float) -> list[str]:
        """Repeat greetings that are not answered, and probe idle pairs; returns the peers that are silent by now: this
        was tried often enough, and the next greeting begins anew."""
        if now < self.due_at:
            return []
        silenced = []
        for pair in self._pairs.values():
            if now < pair.due_at:
                continue
            if pair.num_unanswered >= MAX_GREETINGS:
                pair.num_unanswered, pair.silent, pair.kept = 0, True, False
                silenced.append(pair.peer)
            else:
                self._say_hello(pair, now)
        self.due_at = min((pair.due_at for pair in self._pairs.values()), default=float("inf"))
        return silenced

    def silent(self) -> tuple[str, ...]:
        """Peers that have answered none of the last MAX_GREETINGS."""
        return tuple(pair.peer for pair in self._pairs.values() if pair.silent)

    def _say_hello(self, pair: _Pair, now: float) -> None:
        with suppress(SettingsError):  # as a greeting without an answer: the next one tries again
            self._wire.connect(pair.peer, pair.address)
        pair.greeted_at = now
        pair.num_unanswered += 1
        self.due_at = min(self.due_at, pair.due_at)
        planes = tuple(plane.describe() for plane in self._planes)
        self._wire.send(pair.peer, Hello(worker=self._identity, namespace=self._namespace, planes=planes))

    def on_hello(self, peer: str, hello: Hello, now: float) -> bool:
        """Decode's side; whether the pair is made."""
        refusal = self._why_not(peer, hello)
        plane = None if refusal else choose(self._planes, hello.planes)
        if plane is None:
            self._wire.send(
                peer, Refused(reason=refusal or "no common data plane with addresses that both hosts reach")
            )
            return False
        plane.connect(peer, next(address for address in hello.planes if address.plane == plane.name))
        pair = self._pairs.setdefault(peer, _Pair(peer))
        pair.plane, pair.used_at = plane, now
        self._wire.send(peer, Welcome(worker=self._identity, plane=plane.describe()))
        return True

    def on_welcome(self, peer: str, welcome: Welcome, now: float) -> bool:
        """Prefill's side; False for an unexpected welcome."""
        pair = self._pairs.get(peer)
        plane = next((p for p in self._planes if p.name == welcome.plane.plane), None)
        if pair is None or plane is None or welcome.worker != peer:
            return False
        plane.connect(peer, welcome.plane)
        pair.plane, pair.welcomed_at, pair.num_unanswered, pair.silent = plane, now, 0, False
        return True

    def forget(self, peer: str) -> None:
        """Free what the plane holds for this peer."""
        pair = self._pairs.pop(peer, None)
        if pair is not None and pair.plane is not None:
            pair.plane.forget(peer)

    def idle(self, now: float) -> list[str]:
        """Peers of pairs that were not used for PAIR_IDLE_S."""
        return [pair.peer for pair in self._pairs.values() if not pair.kept and now - pair.used_at > PAIR_IDLE_S]

    def _why_not(self, peer: str, hello: Hello) -> str:
        if hello.version != TRANSFER_VERSION:
            return f"version {hello.version} of transfers, this worker speaks {TRANSFER_VERSION}"
        if len(self._pairs) >= MAX_PAIRS and peer not in self._pairs:
            return "too many pairs"
        if hello.worker != peer:
            return "the name in the message is not the name of the connection"
        if hello.namespace != self._namespace:
            return "another namespace: the two workers do not hold the same model, dtype and KV layout"
        return ""
