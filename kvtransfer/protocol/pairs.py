"""Which workers pair over which data plane: greetings, refusals, and forgetting.

Prefill greets (Hello, with the planes it offers), decode chooses one and answers (Welcome), or says why not (Refused).
A pair of different namespaces is never made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.kvtransfer.planes.base import Plane, choose
from baton.kvtransfer.protocol.receiver import Landings
from baton.node.messages.base import PROTOCOL_VERSION, Message
from baton.node.messages.control import Refused
from baton.node.messages.transfer import Hello, Welcome

GREET_AGAIN_S = 0.25
MAX_GREETINGS = 12
"""A peer that answers none of so many in a row, over three seconds, cannot be reached."""
GREETING_LASTS_S = 1.0
MAX_PAIRS = 4096
PAIR_IDLE_S = 120.0
"""A pair that was not greeted for so long and moves nothing is forgotten; the next greeting makes it again."""


@dataclass(frozen=True, slots=True)
class PeerTransport:
    """How peers are reached: `send` returns whether the peer could be reached, `connect` opens a link to it."""

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
    landings: Landings = field(default_factory=Landings)

    @property
    def used_at(self) -> float:
        return max(self.greeted_at, self.welcomed_at)


class Pairs:
    """All pairs of one worker. `planes` come in the order of preference."""

    def __init__(self, identity: str, namespace: bytes, planes: Sequence[Plane], wire: PeerTransport) -> None:
        self._identity = identity
        self._namespace = namespace
        self._planes = tuple(planes)
        self._wire = wire
        self._pairs: dict[str, _Pair] = {}

    def plane_of(self, peer: str) -> Plane | None:
        """None until both sides have agreed."""
        pair = self._pairs.get(peer)
        return pair.plane if pair is not None else None

    def landings(self, peer: str) -> Landings:
        """What has landed from it since the pair was made."""
        pair = self._pairs.get(peer)
        return pair.landings if pair is not None else Landings()

    def greet(self, peer: str, address: str, now: float) -> None:
        """Say hello, unless that was done or answered a moment ago."""
        pair = self._pairs.setdefault(peer, _Pair(peer, address))
        if now - pair.welcomed_at < GREETING_LASTS_S or now - pair.greeted_at < GREET_AGAIN_S:
            return
        self._wire.connect(peer, address)
        pair.greeted_at = now
        pair.num_unanswered += 1
        planes = tuple(plane.describe() for plane in self._planes)
        self._wire.send(peer, Hello(worker=self._identity, namespace=self._namespace, planes=planes))

    def greet_again(self, peer: str, now: float) -> bool:
        """Repeat a greeting that is not answered. False: this was tried often enough, and the next one begins anew."""
        pair = self._pairs.get(peer)
        if pair is None or not pair.num_unanswered or now - pair.greeted_at < GREET_AGAIN_S:
            return True
        if pair.num_unanswered >= MAX_GREETINGS:
            pair.num_unanswered = 0
            return False
        self.greet(peer, pair.address, now)
        return True

    def greets_again_at(self, peer: str) -> float:
        pair = self._pairs.get(peer)
        return pair.greeted_at + GREET_AGAIN_S if pair is not None and pair.num_unanswered else float("inf")

    def on_hello(self, peer: str, hello: Hello, now: float) -> bool:
        """Decode's side; whether the pair is made."""
        refusal = self._why_not(peer, hello)
        plane = None if refusal else choose(self._planes, hello.planes)
        if plane is None:
            self._wire.send(peer, Refused(reason=refusal or "no common data plane"))
            return False
        plane.connect(peer, next(address for address in hello.planes if address.plane == plane.name))
        self._pairs[peer] = _Pair(peer, plane=plane, welcomed_at=now, landings=self.landings(peer))
        self._wire.send(peer, Welcome(worker=self._identity, plane=plane.describe()))
        return True

    def on_welcome(self, peer: str, welcome: Welcome, now: float) -> bool:
        """Prefill's side; False for an unexpected welcome."""
        pair = self._pairs.get(peer)
        plane = next((p for p in self._planes if p.name == welcome.plane.plane), None)
        if pair is None or plane is None or welcome.worker != peer:
            return False
        plane.connect(peer, welcome.plane)
        pair.plane, pair.welcomed_at, pair.num_unanswered = plane, now, 0
        return True

    def forget(self, peer: str) -> None:
        """Free what the plane holds for this peer."""
        pair = self._pairs.pop(peer, None)
        if pair is not None and pair.plane is not None:
            pair.plane.forget(peer)

    def idle(self, now: float) -> list[str]:
        """Peers that were not greeted for PAIR_IDLE_S."""
        return [pair.peer for pair in self._pairs.values() if now - pair.used_at > PAIR_IDLE_S]

    def _why_not(self, peer: str, hello: Hello) -> str:
        if hello.version != PROTOCOL_VERSION:
            return f"protocol version {hello.version}, this worker speaks {PROTOCOL_VERSION}"
        if len(self._pairs) >= MAX_PAIRS and peer not in self._pairs:
            return "too many pairs"
        if hello.worker != peer:
            return "the name in the message is not the name of the connection"
        if hello.namespace != self._namespace:
            return "another namespace: the two workers do not hold the same model, dtype and KV layout"
        return ""
