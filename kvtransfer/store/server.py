"""The store without its socket: which workers are attached, what they look up, fetch and put.

    worker                                     store
      Attach(namespace)    ───────────────────►  registers the namespace
                           ◄──── Attached ─────  how to map the arena; from now on the worker beats
      Lookup(id, hashes)   ───────────────────►  RAM, else disk, else peers; what is in RAM is held for (worker, id)
                           ◄──── Found(id) ────  where each block of the longest run is
      Fetch(id, numbers)   ───────────────────►  disk or peer → a slot of the arena, in threads or by messages
                           ◄──── Fetched(id) ──  as they come, held too
      (copies, verifies)
      Release(id)          ───────────────────►  held no more

      Put(id, hashes)      ───────────────────►  slots for those that are not here
                           ◄──── Granted(id) ──
      (copies, hashes)
      Commit(id, digests)  ───────────────────►  found by all workers from now on

What a worker holds ends with Release or Commit, or when it was silent for LEASE_S: whatever it does to a slot after
that, the next reader's digest shows it. No message raises: what makes no sense is dropped or answered with Detached.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from baton.kvtransfer.blocks.checksum import WORD_BYTES, digest_by
from baton.kvtransfer.blocks.events import BlockJournal
from baton.kvtransfer.store.arena import Arena
from baton.kvtransfer.store.arena_index import ArenaIndex, Entry, Holder, Key
from baton.kvtransfer.store.checks import Check, Checks
from baton.kvtransfer.store.loads import Loads, PeerWaits, WorkerWaits
from baton.kvtransfer.store.lower import LowerTier, Space, WriteDone
from baton.kvtransfer.store.members import LEASE_S, Member, Members, OpenRequest
from baton.kvtransfer.store.peers import Peers, Pulled
from baton.node.errors import SettingsError
from baton.node.messages.base import Message
from baton.node.messages.store import (
    DISK,
    PEER,
    RAM,
    STORE_VERSION,
    TIER_NAMES,
    Alive,
    Arrival,
    Attach,
    Beat,
    Commit,
    Damaged,
    Detached,
    Fetch,
    Fetched,
    Found,
    Granted,
    Lookup,
    PeerData,
    PeerFound,
    PeerGet,
    PeerLookup,
    Place,
    Put,
    Release,
    Slot,
    Touch,
)
from baton.node.telemetry import log_event

logger = logging.getLogger("store")

SELF = ""
"""The owner's name of what the store itself holds: no endpoint has it."""

Send = Callable[[str, Message], bool]


class StoreServer:
    """One host's store. One thread makes all calls."""

    def __init__(
        self,
        arena: Arena,
        identity: str,
        lower: LowerTier,
        peers: Peers,
        checks: Checks,
        send: Send,
        journal: BlockJournal,
    ) -> None:
        self.index = ArenaIndex(arena.num_regions, arena.region_bytes, journal)
        self._arena = arena
        self._attached = arena.describe(identity, LEASE_S)
        self._lower = lower
        self._peers = peers
        self._checks = checks
        self._send = send
        self._spaces: dict[bytes, Space] = {}
        self._members = Members()
        self._at_peers: dict[int, Holder] = {}  # lookups that wait for the peers, by the number of the question
        self._numbers = 0
        self._loads = Loads(self.index, arena.span, lower, peers)
        self._saving: dict[Key, Holder] = {}
        self._checking: dict[Key, Holder] = {}  # blocks that are said to be damaged
        self._counters: Counter[str] = Counter()

    # ---- called by the loop

    def on_message(self, peer: str, message: Message, now: float) -> None:
        """One message of a worker or of another store."""
        match message:
            case Attach():
                self._on_attach(peer, message, now)
            case PeerFound() | PeerData():
                if peer in self._peers.links:
                    self._peers.on_message(peer, message)
            case PeerLookup():
                keys = [Key(message.namespace, each) for each in message.hashes]
                self._send(peer, PeerFound(id=message.id, count=self._run_here(keys)))
            case PeerGet():
                self._on_peer_get(peer, message, now)
            case _:
                member = self._members.get(peer)
                if member is None:
                    self._send(peer, Detached(reason="not attached"))
                    return
                member.last_seen_at = now
                self._on_member(peer, member, message, now)

    def tick(self, now: float) -> None:
        """Take in what disk, peers and checks have done, and end the leases of the silent."""
        self._peers.tick(now)
        answers, pulled = self._peers.take()
        for answer in answers:
            holder = self._at_peers.pop(answer.id)
            if (request := self._members.request(holder)) is not None:
                request.peers = answer.holders
                self._send_found(holder, request)
        for done in pulled:
            self._on_pulled(done)
        for check, agrees in self._checks.take():
            self._on_checked(check, agrees)
        for each in self._lower.poll():
            if isinstance(each, WriteDone):
                self.index.release(self._saving.pop(each.key))
            else:
                self._loaded(each.key, each.digest)
        for peer in self._members.silent(now):
            self._forget(peer)

    def stats(self) -> dict[str, float]:
        """The store's own numbers, for its heartbeat."""
        occupancy = self.index.occupancy
        return {
            "ram_blocks": float(occupancy.blocks),
            "ram_used_bytes": float(occupancy.used_bytes),
            "ram_size_bytes": float(occupancy.total_bytes),
            "workers": float(len(self._members)),
            "holders": float(self.index.num_holders),
            **{f"ram_evictions_{reason}": float(count) for reason, count in self.index.evictions.items()},
            **{name: float(count) for name, count in self._counters.items()},
            **{f"loads_{name}": float(count) for name, count in self._loads.outcomes.items()},
            "peer_bytes": float(self._peers.received_bytes),
            **self._lower.stats(),
        }

    # ---- workers

    def _on_attach(self, peer: str, message: Attach, now: float) -> None:
        space = Space(message.namespace, message.block_bytes, message.num_units, message.digest)
        if refusal := self._refusal(peer, message.version, space):
            self._send(peer, Detached(reason=refusal, final=True))
            return
        if self._members.attach(peer, message.namespace, now):
            log_event(logger, "worker_attached", worker=peer, namespace=message.namespace.hex()[:12])
        self.index.release_owner(peer)
        self._lower.open(space)
        self._send(peer, self._attached)

    def _refusal(self, peer: str, version: int, space: Space) -> str:
        """Why this worker cannot attach; "" if it can, and then the namespace is known."""
        if version != STORE_VERSION:
            return f"protocol version {version}, this store speaks {STORE_VERSION}"
        if not self._members.has_room(peer):
            return "too many workers"
        known = self._spaces.get(space.namespace, space)
        if known.digest != space.digest or known.num_units != space.num_units:
            return (
                f"digests by {space.digest} of {space.num_units} units; in this namespace they are by {known.digest} "
                f"of {known.num_units}"
            )
        if space.block_bytes % (space.num_units * (WORD_BYTES if space.digest == "sum64" else 1)):
            return f"a block of {space.block_bytes} bytes is not made of {space.num_units} units of whole words"
        try:
            self.index.register(space.namespace, space.block_bytes)
        except SettingsError as error:
            return str(error)
        self._spaces[space.namespace] = space
        return ""

    def _on_member(self, peer: str, member: Member, message: Message, now: float) -> None:
        match message:
            case Beat():
                self._send(peer, Alive())
            case Lookup():
                self._on_lookup(peer, member, message, now)
            case Fetch():
                self._on_fetch(Holder(peer, message.id), message, now)
            case Put():
                self._on_put(Holder(peer, message.id), member, message)
            case Commit():
                self._on_commit(Holder(peer, message.id), message)
            case Release():
                self._release(Holder(peer, message.id))
            case Touch():
                self.index.touch([Key(member.namespace, each) for each in message.hashes])
            case Damaged():
                self._on_damaged(Key(member.namespace, message.hash))

    def _on_lookup(self, peer: str, member: Member, message: Lookup, now: float) -> None:
        holder = Holder(peer, message.id)
        keys = tuple(Key(member.namespace, each) for each in message.hashes)
        request = OpenRequest(keys, message.first, {})
        if not self._members.open(holder, request):
            self._send(peer, Found(id=message.id, places=()))
            return
        self.index.touch(keys)
        self._use(keys)
        end = message.first + self._run_here(keys[message.first :])
        if end < len(keys) and self._peers.links:
            self._numbers += 1
            if self._peers.ask(self._numbers, keys[end:], now):
                self._at_peers[self._numbers] = holder
                return
        self._send_found(holder, request)

    def _run_here(self, keys: tuple[Key, ...] | list[Key]) -> int:
        """How many of these, from the first on, this host has in RAM or on disk."""
        for number, key in enumerate(keys):
            if self.index.find(key) is None and not self._lower.has(key):
                return number
        return len(keys)

    def _send_found(self, holder: Holder, request: OpenRequest) -> None:
        """Hold what is in RAM, and answer where the longest run of blocks is."""
        places: list[Place] = []
        for key in request.keys[request.first :]:
            entry = self.index.acquire(key, holder)
            if entry is not None:
                places.append(Place(RAM, entry.offset, entry.digest))
            elif self._lower.has(key):
                places.append(Place(DISK))
            elif key in request.peers:
                places.append(Place(PEER))
            else:
                break
        self._counters["lookups"] += 1
        self._counters["lookup_blocks"] += len(request.keys) - request.first
        self._counters.update(f"found_{TIER_NAMES[place.tier]}" for place in places)
        self._send(holder.owner, Found(id=holder.id, places=tuple(places)))

    def _on_fetch(self, holder: Holder, message: Fetch, now: float) -> None:
        request = self._members.request(holder)
        arrivals: list[Arrival] = []
        for index in message.indices:
            key = request.keys[index] if request is not None and index < len(request.keys) else None
            if request is None or key is None:
                arrivals.append(Arrival(index))
            elif (entry := self.index.acquire(key, holder)) is not None:
                arrivals.append(Arrival(index, entry.offset, entry.digest))
            elif not self._loads.want(key, WorkerWaits(holder, index), request.peers.get(key), now):
                arrivals.append(Arrival(index))
        if arrivals:
            self._send(holder.owner, Fetched(id=message.id, arrivals=tuple(arrivals)))

    def _on_put(self, holder: Holder, member: Member, message: Put) -> None:
        keys = tuple(Key(member.namespace, each) for each in message.hashes)
        slots = []
        opened = self._members.open(holder, OpenRequest(keys, 0, {}))
        for index, key in enumerate(keys if opened else ()):
            if (entry := self.index.reserve(key, holder)) is not None:
                slots.append(Slot(index, entry.offset))
        self._use([key for key in keys if self.index.find(key) is not None])
        self._counters["put_blocks"] += len(keys)
        self._counters["put_granted"] += len(slots)
        self._send(holder.owner, Granted(id=message.id, slots=tuple(slots)))

    def _on_commit(self, holder: Holder, message: Commit) -> None:
        request = self._members.request(holder)
        keys = request.keys if request is not None else ()
        for written in message.written:
            if written.index < len(keys) and self.index.commit(keys[written.index], holder, written.digest):
                self._counters["put_committed"] += 1
                self._use([keys[written.index]])
        self._release(holder)

    def _on_damaged(self, key: Key) -> None:
        """Believe it only after looking: a worker may have read a slot that was not its own any more."""
        if key in self._checking:
            return
        self._numbers += 1
        holder = Holder(SELF, self._numbers)
        if (entry := self.index.acquire(key, holder)) is not None:
            self._checking[key] = holder
            self._check(Check(key, self._span(entry), entry.digest, arriving=False))

    def _check(self, check: Check) -> None:
        space = self._spaces[check.key.namespace]
        self._checks.begin(check, digest_by(space.digest, space.num_units))

    def _on_checked(self, check: Check, agrees: bool) -> None:
        if check.arriving:
            self._loaded(check.key, check.digest if agrees else b"")
            return
        self.index.release(self._checking.pop(check.key))
        if not agrees:
            self.index.drop(check.key)
            self._lower.drop(check.key)

    # ---- other stores

    def _on_peer_get(self, peer: str, message: PeerGet, now: float) -> None:
        key = Key(message.namespace, message.hash)
        if self.index.find(key) is None and self._loads.want(key, PeerWaits(peer, message), None, now):
            return
        self._send_piece(peer, message)

    def _send_piece(self, peer: str, message: PeerGet) -> None:
        entry = self.index.find(Key(message.namespace, message.hash))
        found = PeerData(namespace=message.namespace, hash=message.hash, offset=message.offset)
        if entry is not None and message.offset + message.size_bytes <= entry.size_bytes:
            piece = self._span(entry)[message.offset : message.offset + message.size_bytes]
            found = PeerData(
                namespace=message.namespace,
                hash=message.hash,
                offset=message.offset,
                digest=entry.digest,
                data=bytes(piece),
            )
        self._send(peer, found)

    def _on_pulled(self, done: Pulled) -> None:
        """What another store says is looked at before it can be found here."""
        if done.digest:
            self._check(Check(done.key, self._loads.span_of(done.key), done.digest, arriving=True))
        else:
            self._loaded(done.key, b"")

    # ---- disk

    def _use(self, keys: tuple[Key, ...] | list[Key]) -> None:
        """These are used: what the disk wants is written behind, held meanwhile."""
        for key in keys:
            entry = self.index.find(key)
            if entry is None or key in self._saving or not self._lower.wants(key):
                continue
            self._numbers += 1
            holder = Holder(SELF, self._numbers)
            if self._lower.write(key, self._span(entry), entry.digest):
                self.index.acquire(key, holder)
                self._saving[key] = holder

    def _loaded(self, key: Key, digest: bytes) -> None:
        """A block has come from disk or a peer, or not (then it has no digest): answer all that wait for it."""
        for waiter in self._loads.end(key, digest):
            if isinstance(waiter, PeerWaits):
                self._send_piece(waiter.peer, waiter.get)
            elif self._members.request(holder := waiter.holder) is not None:
                entry = self.index.acquire(key, holder)
                place = (entry.offset, entry.digest) if entry is not None else ()
                self._send(holder.owner, Fetched(id=holder.id, arrivals=(Arrival(waiter.index, *place),)))

    # ---- leases

    def _release(self, holder: Holder) -> None:
        self._members.close(holder)
        self.index.release(holder)

    def _forget(self, peer: str) -> None:
        self._members.detach(peer)
        log_event(logger, "worker_silent", worker=peer, held=self.index.release_owner(peer))

    def _span(self, entry: Entry) -> memoryview:
        return self._arena.span(entry.offset, entry.size_bytes)
