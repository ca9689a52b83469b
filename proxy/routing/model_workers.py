"""The workers of one model as the proxy knows them: what each has registered, reported, and been sent since.

It knows no socket and no clock. What a worker reported is old by a heartbeat: what was sent to it since, and what has
ended, is counted on top.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from baton.node.errors import BadRequest, PeerLost
from baton.node.membership import HEARTBEAT_S
from baton.node.messages.control import MAX_PEERS, Heartbeat, Load, Register
from baton.proxy.routing.adapter_places import NO_ADAPTERS, AdapterPlaces, RequestAdapter, lacking
from baton.proxy.routing.failed_pairs import Pair
from baton.proxy.routing.roles import MixedRoles, WorkerInterval
from baton.proxy.routing.router import WorkerView
from baton.proxy.routing.shares import Shares

MAX_REVISIONS = 8
"""Of a model at once; usually there is one, and two during a rolling update."""
NOMINAL_TOKENS_S = 10_000.0
"""Prompt tokens a second, until a worker has measured them; only ratios of costs count then."""


@dataclass(slots=True)
class Leg:
    """One worker's part of one attempt, from dispatch to its terminal message."""

    worker: str
    request_id: str
    tokens: int
    blocks: int
    sent_at: float
    hashes: tuple[bytes, ...] = ()
    """Of the blocks that this leg will have computed."""
    tenant: str = ""


@dataclass(slots=True)
class KnownWorker:
    """A worker."""

    register: Register
    last_message_at: float
    load: Load = field(default_factory=Load)
    draining: bool = False
    orphaned: bool = False
    silent_peers: tuple[str, ...] = ()
    progress_at: float = 0.0
    legs: dict[str, Leg] = field(default_factory=dict)  # by request id
    reported_at: float = float("-inf")
    """When its load was as it reported last: what was sent to it since comes on top."""
    begun_tokens: int = 0
    """Of legs that it had when it reported, computed by then."""
    done_tokens: int = 0
    """Of the waiting ones that it reported: computed, or given up, since."""
    ended: int = 0
    """Of the requests that it reported: have ended since."""
    places: AdapterPlaces = NO_ADAPTERS
    view: WorkerView | None = None
    """None where it must be made anew."""


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """What all workers of a revision agree on."""

    namespace: bytes
    block_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Revision:
    """Workers that may be paired: those of one revision of a deployment, which share a namespace."""

    name: str
    shape: ClusterShape
    workers: tuple[WorkerView, ...]


@dataclass(slots=True)
class _KnownRevision:
    shape: ClusterShape
    """As it was last, once its workers are gone."""
    had_at: dict[str, float] = field(default_factory=dict)
    """By role, as of a worker that takes requests."""


class ModelWorkers:
    """The workers of one model, of one or more revisions. Named by endpoint identity, `worker/incarnation`."""

    def __init__(self, mixed: MixedRoles) -> None:
        """`mixed`: the plan for mixed workers."""
        self.members: dict[str, KnownWorker] = {}
        self.mixed = mixed
        self.shares = Shares()
        self._known: dict[str, _KnownRevision] = {}
        self._tokens_s = NOMINAL_TOKENS_S  # the median of those that were measured
        self._median_at = float("-inf")

    @property
    def shape(self) -> ClusterShape | None:
        """That of the oldest revision, with the least length of all; None until a worker has registered."""
        members = list(self.members.values())
        return _shape_of(members) if members else None

    @property
    def block_tokens(self) -> int:
        """Of the oldest revision, also while all workers are gone; 0 until a worker has registered."""
        return next((known.shape.block_tokens for known in self._known.values()), 0)

    @property
    def revision_names(self) -> tuple[str, ...]:
        """At most MAX_REVISIONS."""
        return tuple(self._known)

    def revisions(self) -> list[Revision]:
        """The oldest first; some may have no worker any more."""
        views: defaultdict[str, list[WorkerView]] = defaultdict(list)
        for member, view in zip(self.members.values(), self.view(), strict=True):
            views[member.register.revision].append(view)
        return [Revision(name, known.shape, tuple(views[name])) for name, known in self._known.items()]

    def had_at(self, revision: str, role: str) -> float:
        """Time of the last message of a worker that takes requests of the role; -inf if there never was one."""
        had_at = self._known[revision].had_at
        return max(had_at.get(each, float("-inf")) for each in (role, "mixed"))

    def join(self, identity: str, register: Register, now: float) -> str:
        """Take a worker in; returns "" or the reason for refusing it. One that goes on to register hears nothing: only
        its heartbeats keep it."""
        name = register.revision
        siblings = self._of(name)
        if siblings and siblings[0].register.namespace != register.namespace:
            return "another namespace: this cluster serves another model, dtype or KV layout" + (
                f" in revision {name}" if name else "; workers of a new one need a --revision"
            )
        if not siblings and len({member.register.revision for member in self.members.values()}) >= MAX_REVISIONS:
            return f"there are {MAX_REVISIONS} revisions already"
        if identity not in self.members:
            load = Load(free_blocks=register.total_blocks, total_blocks=register.total_blocks)
            self.members[identity] = KnownWorker(register, now, load, progress_at=now, places=_places(register, load))
        self._reshape(name)
        self._known[name].had_at[register.role] = now
        return ""

    def peers_of(self, identity: str) -> tuple[tuple[str, str], ...]:
        """Other mixed workers of a mixed worker's revision, some of them where there are many."""
        mine = self.members[identity].register
        others = (
            (other, member.register.address)
            for other, member in self.members.items()
            if other != identity and member.register.role == "mixed" and member.register.revision == mine.revision
        )
        return tuple(islice(others, MAX_PEERS)) if mine.role == "mixed" else ()

    def remove(self, identity: str) -> None:
        """It has left or died; its legs have been settled."""
        self._reshape(self.members.pop(identity).register.revision)

    def _of(self, revision: str) -> list[KnownWorker]:
        return [member for member in self.members.values() if member.register.revision == revision]

    def _reshape(self, name: str) -> None:
        """Know what the members of a revision agree on; of one that has none any more, what it was."""
        if members := self._of(name):
            known = self._known.setdefault(name, _KnownRevision(_shape_of(members)))
            known.shape = _shape_of(members)
        while len(self._known) > MAX_REVISIONS:
            del self._known[next(each for each in self._known if not self._of(each))]

    def beat(self, identity: str, heartbeat: Heartbeat, now: float) -> None:
        """What a member reports replaces what was counted for it since its last report."""
        member = self.members[identity]
        if heartbeat.load.steps != member.load.steps or heartbeat.load.running == 0:
            member.progress_at = now
        if member.register.role != "prefill":
            self.mixed.progress(_progress(member, heartbeat, now), self._tokens_s)
        member.load, member.draining, member.last_message_at = heartbeat.load, heartbeat.draining, now
        member.orphaned = heartbeat.orphaned
        member.places = _places(member.register, heartbeat.load)
        member.silent_peers = heartbeat.silent_peers
        member.reported_at = now - heartbeat.load_age_s
        seen = sum(leg.tokens for leg in member.legs.values() if leg.sent_at < member.reported_at)
        member.begun_tokens, member.done_tokens = max(0, seen - heartbeat.load.waiting_tokens), 0
        member.ended = 0
        member.view = None
        if now - self._median_at >= HEARTBEAT_S:
            self._median_at = now
            measured = [m.load.prefill_tokens_s for m in self.members.values() if m.load.prefill_tokens_s]
            self._tokens_s = statistics.median(measured) if measured else NOMINAL_TOKENS_S
        if not member.draining:
            self._known[member.register.revision].had_at[member.register.role] = now

    def takers_of(self, adapter: RequestAdapter) -> dict[str, list[str]]:
        """Workers of each role that can have the adapter. Raises PeerLost where no worker is there, BadRequest where a
        role has none that can."""
        found: dict[str, list[str]] = {}
        for identity, member in self.members.items():
            if not member.draining:
                able = found.setdefault(member.register.role, [])
                able += [identity] if member.places.take(adapter) else []
        if not found:
            raise PeerLost("no worker has registered yet")
        for role, workers in found.items():
            if not workers:
                places = [each.places for each in self.members.values() if each.register.role == role]
                raise BadRequest(lacking(role, adapter, places), param="lora_path")
        return found

    def cut_pairs(self) -> frozenset[Pair]:
        """Pairs of live workers of which the first says that the other does not answer."""
        found = [(name, peer) for name, member in self.members.items() for peer in member.silent_peers]
        return frozenset(pair for pair in found if pair[1] in self.members)

    def view(self) -> tuple[WorkerView, ...]:
        for identity, member in self.members.items():
            if member.view is None:
                member.view = _view(identity, member, self._tokens_s)
        return tuple(member.view for member in self.members.values() if member.view is not None)


def _progress(member: KnownWorker, heartbeat: Heartbeat, now: float) -> WorkerInterval:
    before, after = member.load, heartbeat.load
    counted = [
        max(0.0, after.counters.get(name, 0.0) - before.counters.get(name, 0.0))
        for name in ("prompt_tokens_computed", "generated_tokens")
    ]
    return WorkerInterval(
        seconds=now - heartbeat.load_age_s - member.reported_at if math.isfinite(member.reported_at) else 0.0,
        steps=after.steps - before.steps,
        prompt_tokens=counted[0],
        answer_tokens=counted[1],
        busy=before.running > 0 and after.running > 0,
    )


def _shape_of(members: Sequence[KnownWorker]) -> ClusterShape:
    first = members[0].register
    longest = min(member.register.max_model_len for member in members)
    return ClusterShape(first.namespace, first.block_tokens, longest)


def _view(identity: str, member: KnownWorker, tokens_s: float) -> WorkerView:
    unseen = [leg for leg in member.legs.values() if leg.sent_at >= member.reported_at]
    load = member.load
    return WorkerView(
        identity=identity,
        address=member.register.address,
        role=member.register.role,
        draining=member.draining,
        requests=max(load.running + load.waiting - member.ended + len(unseen), len(member.legs)),
        tokens=max(0, load.waiting_tokens - member.done_tokens) + sum(leg.tokens for leg in unseen),
        free_blocks=max(0, load.free_blocks - sum(leg.blocks for leg in unseen)),
        total_blocks=load.total_blocks,
        max_num_seqs=member.register.max_num_seqs,
        tokens_s=_speed(load.prefill_tokens_s, tokens_s),
        grammar=member.register.grammar,
        adapters=member.places,
    )


def _places(register: Register, load: Load) -> AdapterPlaces:
    if not register.max_loras:
        return NO_ADAPTERS
    in_slots, in_memory = frozenset(load.adapters), frozenset(load.adapters_in_memory)
    return AdapterPlaces(register.max_loras, register.max_lora_rank, in_slots, in_memory)


def _speed(own: float, median: float) -> float:
    """A worker counts as fast as its peers until it is twice as fast, or half: less may be its neighbours' noise, and
    an idle cluster would send all to the one that was disturbed least."""
    return median if median / 2 <= own <= median * 2 or not own else own
