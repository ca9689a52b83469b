"""Which workers are alive and how loaded: the proxy's soft state, rebuilt from registrations and heartbeats.

It knows no socket and no clock. A worker is lost when it was silent for DEAD_AFTER_S, when its connection is gone, or
when it has work and its step count stands still for `stall_s`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from baton.node.endpoint import identity_of
from baton.node.errors import BadRequest, PeerLost
from baton.node.membership import DEAD_AFTER_S, HEARTBEAT_S, name_error
from baton.node.messages.control import MAX_PEERS, Heartbeat, Load, Register, RegisterStore
from baton.node.messages.versions import version_error
from baton.node.telemetry import excerpt
from baton.proxy.interface import WorkerStatus
from baton.proxy.routing.adapter_places import NO_ADAPTERS, AdapterPlaces, RequestAdapter, lacking
from baton.proxy.routing.failed_pairs import Pair
from baton.proxy.routing.roles import MixedRoles, WorkerInterval
from baton.proxy.routing.router import WorkerView
from baton.proxy.routing.shares import Shares

MAX_WORKERS, MAX_STORES = 4096, 1024
"""Of all models; a store is a host's."""
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
class _Member:
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


@dataclass(slots=True)
class _Store:
    """A host's store: it computes nothing; its heartbeats and block events are all that counts."""

    register: RegisterStore
    last_message_at: float
    load: Load = field(default_factory=Load)


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
        self.members: dict[str, _Member] = {}
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
            self.members[identity] = _Member(register, now, load, progress_at=now, places=_places(register, load))
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

    def _of(self, revision: str) -> list[_Member]:
        return [member for member in self.members.values() if member.register.revision == revision]

    def _reshape(self, name: str) -> None:
        """Know what the members of a revision agree on; of one that has none any more, what it was."""
        if members := self._of(name):
            known = self._known.setdefault(name, _KnownRevision(_shape_of(members)))
            known.shape = _shape_of(members)
        while len(self._known) > MAX_REVISIONS:
            del self._known[next(each for each in self._known if not self._of(each))]

    def beat(self, identity: str, heartbeat: Heartbeat, now: float) -> None:
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
                raise BadRequest(lacking(role, adapter), param="lora_path")
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


class ClusterState:
    """The workers of all models, and the hosts' stores, which belong to none."""

    def __init__(
        self,
        stall_s: float,
        models: Sequence[str],
        namespaces: Sequence[str] = (),
        mixed: Callable[[], MixedRoles] = lambda: MixedRoles(1.0, 0.05),
    ) -> None:
        """`models`: names under which they are served. `namespaces`: how that of a worker may begin, in hex digits;
        none: as it likes. `mixed`: makes the plan for a model's mixed workers."""
        self.models = {name: ModelWorkers(mixed()) for name in models}
        self._stores: dict[str, _Store] = {}
        self._stall_s = stall_s
        self._namespaces = tuple(namespaces)

    def join(self, identity: str, register: Register, now: float) -> str:
        """Take a worker in; returns "" or the reason for refusing it."""
        if reason := _refusal(identity, register):
            return reason
        if register.revision and (reason := name_error(register.revision)):
            return f"revision: {reason}"
        if self._namespaces and not register.namespace.hex().startswith(self._namespaces):
            return f"another namespace than --namespace {' '.join(self._namespaces)}"
        workers = self._model_of(register)
        if workers is None:
            return f"this proxy serves {', '.join(self.models)}, not {excerpt(register.model, 80)}"
        if not self.knows(identity) and sum(len(each.members) for each in self.models.values()) >= MAX_WORKERS:
            return f"there are {MAX_WORKERS} workers already"
        return workers.join(identity, register, now)

    def peers_of(self, identity: str) -> tuple[tuple[str, str], ...]:
        """What a worker that has joined should greet."""
        workers = self._workers_with(identity)
        return workers.peers_of(identity) if workers is not None else ()

    def join_store(self, identity: str, register: RegisterStore, now: float) -> str:
        """Take a store in; returns "" or the reason for refusing it."""
        if reason := _refusal(identity, register):
            return reason
        if identity not in self._stores and len(self._stores) >= MAX_STORES:
            return f"there are {MAX_STORES} stores already"
        self._stores.setdefault(identity, _Store(register, now)).last_message_at = now
        return ""

    def beat(self, identity: str, heartbeat: Heartbeat, now: float) -> bool:
        """False if nothing of this name has registered."""
        if (store := self._stores.get(identity)) is not None:
            store.last_message_at, store.load = now, heartbeat.load
            return True
        workers = self._workers_with(identity)
        if workers is None:
            return False
        workers.beat(identity, heartbeat, now)
        return True

    def lose(self, identity: str) -> bool:
        """It left or died; whether it was here until now."""
        workers = self._workers_with(identity)
        if workers is not None:
            for request_id in list(workers.members[identity].legs):
                self.settle(identity, request_id)
            workers.remove(identity)
            return True
        return self._stores.pop(identity, None) is not None

    def excuse(self, now: float) -> None:
        """This process could hear nothing until `now`: silence and standstill count from here."""
        for _, member in self._members():
            member.last_message_at = member.progress_at = now
        for store in self._stores.values():
            store.last_message_at = now

    def overdue(self, now: float) -> list[tuple[str, str]]:
        """Workers to be taken for dead, each with the reason."""
        dead = []
        for identity, member in self._members():
            if now - member.last_message_at > DEAD_AFTER_S:
                dead.append((identity, "silent"))
            elif now - member.progress_at > self._stall_s:
                dead.append((identity, "no step"))
        dead += [(identity, "silent") for identity, s in self._stores.items() if now - s.last_message_at > DEAD_AFTER_S]
        return dead

    def identities(self) -> list[str]:
        """Of all workers and stores."""
        return [*(identity for identity, _ in self._members()), *self._stores]

    def knows(self, identity: str) -> bool:
        return self._workers_with(identity) is not None or identity in self._stores

    def assign(self, leg: Leg) -> None:
        """Count work at dispatch: the next heartbeat comes too late for a burst."""
        if (workers := self._workers_with(leg.worker)) is not None:
            member = workers.members[leg.worker]
            assert leg.request_id not in member.legs, leg.request_id
            member.legs[leg.request_id] = leg
            member.view = None
            workers.shares.take(leg.tenant, member.register.role, leg.tokens, leg.blocks)

    def prompt_computed(self, worker: str, request_id: str) -> None:
        """That leg's prompt waits no longer: the next heartbeat would show it too late, as at dispatch."""
        workers = self._workers_with(worker)
        member = workers.members[worker] if workers is not None else None
        if workers is not None and member is not None and (leg := member.legs.get(request_id)) is not None:
            if leg.sent_at < member.reported_at:
                begun = min(member.begun_tokens, leg.tokens)  # prompts are computed in order, or nearly
                member.begun_tokens -= begun
                member.done_tokens += leg.tokens - begun
            workers.shares.computed(leg.tenant, leg.tokens)
            leg.tokens = 0
            member.view = None

    def settle(self, worker: str, request_id: str) -> None:
        self.prompt_computed(worker, request_id)
        if (workers := self._workers_with(worker)) is not None:
            member = workers.members[worker]
            member.view = None
            if (leg := member.legs.pop(request_id, None)) is not None:
                member.ended += leg.sent_at < member.reported_at
                workers.shares.leave(leg.tenant, member.register.role, leg.blocks)

    def is_replaced(self, identity: str) -> bool:
        """Whether this worker is an orphan, and one of its name has started later."""
        member = self._member(identity)
        return (
            member is not None
            and member.orphaned
            and any(
                each.register.worker == member.register.worker
                and each.register.incarnation > member.register.incarnation
                for _, each in self._members()
            )
        )

    def statuses(self) -> list[WorkerStatus]:
        found = [
            WorkerStatus(
                m.register.worker,
                m.register.role,
                "draining" if m.draining else "ready",
                m.load,
                m.register.block_tokens,
                model,
                m.register.revision,
                m.orphaned,
                m.register.max_loras,
            )
            for model, workers in self.models.items()
            for m in workers.members.values()
        ]
        return found + [WorkerStatus(s.register.worker, "store", "ready", s.load) for s in self._stores.values()]

    def _model_of(self, register: Register) -> ModelWorkers | None:
        """The entry that a worker joins: the only one, whatever its folder is called, else that of its model's name."""
        if len(self.models) == 1:
            (only,) = self.models.values()
            return only
        return self.models.get(register.model)

    def _workers_with(self, identity: str) -> ModelWorkers | None:
        return next((workers for workers in self.models.values() if identity in workers.members), None)

    def _member(self, identity: str) -> _Member | None:
        workers = self._workers_with(identity)
        return workers.members[identity] if workers is not None else None

    def _members(self) -> Iterator[tuple[str, _Member]]:
        for workers in self.models.values():
            yield from workers.members.items()


def _progress(member: _Member, heartbeat: Heartbeat, now: float) -> WorkerInterval:
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


def _refusal(identity: str, register: Register | RegisterStore) -> str:
    """The reason for refusing the sender, or ""."""
    if identity != identity_of(register.worker, register.incarnation):
        return "the name in the message is not the name of the connection"
    if reason := name_error(register.worker):
        return reason
    return version_error(register.version)


def _shape_of(members: Sequence[_Member]) -> ClusterShape:
    first = members[0].register
    longest = min(member.register.max_model_len for member in members)
    return ClusterShape(first.namespace, first.block_tokens, longest)


def _view(identity: str, member: _Member, tokens_s: float) -> WorkerView:
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
