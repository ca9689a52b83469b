"""Blocks from other hosts' stores: which peers to ask, and pulling a block piece by piece. No sockets, no clock.

    PeerLookup(hashes) ──► every peer that answers          PeerGet(piece) ──► the peer that has the block
    PeerFound(count)   ◄── or PATIENCE_S has passed         PeerData(piece) ◄── at most WINDOW pieces are asked for

A peer that did not answer in time is left in peace for REST_S. The bytes are pulled straight to where they shall lie;
the digest of the whole block, which comes with each piece, is for the caller to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.kvtransfer.store.arena_index import Key
from baton.node.messages.base import Message
from baton.node.messages.store import MAX_PIECE_BYTES, PeerData, PeerFound, PeerGet, PeerLookup

PATIENCE_S = 0.25
REST_S = 5.0
PULL_S = 5.0
"""A block that has not come whole by then does not come."""
WINDOW = 8

Send = Callable[[str, Message], bool]


@dataclass(slots=True)
class _Question:
    """One lookup at the peers; `left` have not answered yet."""

    keys: tuple[Key, ...]
    left: set[str]
    deadline: float
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Pull:
    key: Key
    peer: str
    target: memoryview
    deadline: float
    asked: int = 0
    """Bytes that were asked for, from the start."""
    missing: set[int] = field(default_factory=set)
    """Offsets of the pieces that were asked for and have not come."""
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What the peers have of a lookup's blocks: which peer can give which."""

    id: int
    holders: dict[Key, str]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pull has ended: the peer's bytes lie where they were wanted; without a digest: they do not."""

    key: Key
    digest: bytes
    """As the peer sent it; not compared yet."""


class Peers:
    """`links` are the endpoint's names of the links to the other stores; only these are believed."""

    def __init__(self, links: Sequence[str], send: Send) -> None:
        self.links = frozenset(links)
        self.received_bytes = 0
        self._send = send
        self._questions: dict[int, _Question] = {}
        self._pulls: dict[Key, _Pull] = {}
        self._rests: dict[str, float] = {}
        self._answers: list[PeerAnswer] = []
        self._pulled: list[Pulled] = []

    def ask(self, id: int, keys: Sequence[Key], now: float) -> bool:
        """Ask which peers have a prefix of these blocks of one namespace; PeerAnswer follows, unless it returns False.

        `id` is the caller's number for it, and new.
        """
        message = PeerLookup(id=id, namespace=keys[0].namespace, hashes=tuple(key.hash for key in keys))
        awake = [link for link in self.links if now >= self._rests.get(link, 0.0)]
        asked = {link for link in awake if self._send(link, message)}
        if asked:
            self._questions[id] = _Question(tuple(keys), asked, now + PATIENCE_S)
        return bool(asked)

    def pull(self, key: Key, peer: str, target: memoryview, now: float) -> None:
        """Begin to copy a block of that peer to `target`; a Pulled follows."""
        self._pulls[key] = pull = _Pull(key, peer, target, now + PULL_S)
        self._ask_pieces(pull)

    def on_message(self, link: str, message: PeerFound | PeerData) -> None:
        """What a peer has answered; what fits no question is dropped."""
        if isinstance(message, PeerFound):
            question = self._questions.get(message.id)
            if question is not None and link in question.left:
                question.left.discard(link)
                question.counts[link] = message.count
                if not question.left:
                    self._answer(message.id)
            return
        pull = self._pulls.get(Key(message.namespace, message.hash))
        if pull is not None and pull.peer == link:
            self._on_piece(pull, message)

    def tick(self, now: float) -> None:
        """Give up what has waited too long."""
        for id, question in [*self._questions.items()]:
            if now >= question.deadline:
                self._rests.update({link: now + REST_S for link in question.left})
                self._answer(id)
        for pull in [*self._pulls.values()]:
            if now >= pull.deadline:
                self._end(pull, b"")

    def take(self) -> tuple[list[PeerAnswer], list[Pulled]]:
        """What has come since the last call."""
        answers, self._answers = self._answers, []
        pulled, self._pulled = self._pulled, []
        return answers, pulled

    # -- inside

    def _answer(self, id: int) -> None:
        question = self._questions.pop(id)
        holders: dict[Key, str] = {}
        for link, count in sorted(question.counts.items(), key=lambda each: each[1]):
            holders.update({key: link for key in question.keys[:count]})
        self._answers.append(PeerAnswer(id, holders))

    def _ask_pieces(self, pull: _Pull) -> None:
        while pull.asked < len(pull.target) and len(pull.missing) < WINDOW:
            size = min(MAX_PIECE_BYTES, len(pull.target) - pull.asked)
            key = pull.key
            get = PeerGet(namespace=key.namespace, hash=key.hash, offset=pull.asked, size_bytes=size)
            if not self._send(pull.peer, get):
                self._end(pull, b"")
                return
            pull.missing.add(pull.asked)
            pull.asked += size

    def _on_piece(self, pull: _Pull, message: PeerData) -> None:
        size = min(MAX_PIECE_BYTES, len(pull.target) - message.offset)
        fits = message.offset in pull.missing and len(message.data) == size
        if not message.digest or not fits or (pull.digest and pull.digest != message.digest):
            self._end(pull, b"")
            return
        pull.target[message.offset : message.offset + size] = message.data
        pull.digest = message.digest
        pull.missing.discard(message.offset)
        self.received_bytes += size
        self._ask_pieces(pull)
        if not pull.missing and pull.asked == len(pull.target):
            self._end(pull, pull.digest)

    def _end(self, pull: _Pull, digest: bytes) -> None:
        if self._pulls.pop(pull.key, None) is not None:
            self._pulled.append(Pulled(pull.key, digest))
