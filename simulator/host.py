"""One simulated worker: the real loop and role, the real I/O thread with membership and exchange, on simulated time.

A turn of the loop happens at one instant, and its step takes as long as the latency model predicts. The effects that
follow the step (messages to proxy and exchange, the load report) are delayed until the step ends, and input that
arrives meanwhile waits for the next turn, as it does in a process with a separate I/O thread (`delayed`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Set
from itertools import accumulate, pairwise
from typing import NamedTuple

from baton.decode.role import DecodeRole, decode_loop
from baton.decode.settings import DecodeSettings
from baton.kvtransfer.blocks.events import FLUSH_EVERY_S, EventLog
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.protocol.exchange import ChunkLimits, TransferExchange
from baton.kvtransfer.protocol.pairs import PeerTransport
from baton.kvtransfer.reshard import Cut
from baton.kvtransfer.store.client import NO_STORE, Store
from baton.kvtransfer.store.events import StoreEvent
from baton.models.config import FULL_STEP_TOKENS
from baton.node.endpoint import identity_of
from baton.node.membership import Membership
from baton.node.messages.base import Role
from baton.node.messages.control import Load, Register
from baton.prefill.role import prefill_loop
from baton.prefill.settings import PrefillSettings
from baton.simulator.adapters import RANK, AdapterTraffic, SimSlots, sim_adapters
from baton.simulator.delayed import DelayedIo, DelayedJournal
from baton.simulator.latency import Profile
from baton.simulator.network import Network, SimLine, SimPlane, digests_of
from baton.simulator.parallel import WorkerSize
from baton.simulator.runner import SimRunner, token_of
from baton.simulator.store import HostStore
from baton.simulator.store_client import SimStore
from baton.worker.adapter_slots import AdapterRead
from baton.worker.io_thread import IoThread
from baton.worker.loop import Loop
from baton.worker.parts import NO_ADAPTERS, Adapters, Parts
from baton.worker.prefix_loading import PrefixLoader
from baton.worker.sequence import Sequence as WorkerSequence

PROXY = "proxy"
NAMESPACE = b"simulated namespace".ljust(32, b".")
LOOK_S = 1.0
"""A worker that holds something but has no step to do looks for passed deadlines so often."""
SOON_S = 1e-5
"""A turn that changed something without a step is followed by another at once; not at the same instant, for ever."""


class Sharing(NamedTuple):
    """How a worker is shared out, where some have several GPUs."""

    size: WorkerSize
    by_layer: bool
    """Planes move layers of units, since some worker has stages."""


class Host:
    """One life of a worker. `name` is unique among all lives.

    A decode worker whose next steps are all alike is left alone until one of them matters: a last token, a
    heartbeat, a message that comes in. Then the turns in between are made up for, each at its own time (`_catch_up`),
    by the same code; only the events, and the proxy's work for each single token, are saved. `ahead=False` does
    without. So does a worker with a `store`, because others must find there what its steps have filled.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        role: Role,
        profile: Profile,
        sharing: Sharing | None,
        policy: str,
        ahead: bool,
        store: HostStore | None,
        store_loads: str,
        traffic: AdapterTraffic | None,
    ) -> None:
        """profile: of a worker of this size. sharing: None where it has one GPU, as all that it meets. traffic: of
        adapters, if there are any."""
        self.identity = identity_of(name, 1)
        stages = sharing.size.stages if sharing is not None else 1
        adapter_s = 0.0 if traffic is None else traffic.size_bytes / traffic.step_bytes_s
        self.runner = SimRunner(profile, stages, self._clock, adapter_s)
        events = EventLog()
        self._journal = DelayedJournal(events.journal("gpu"), self.runner)
        self._manager = manager = BlockManager(profile.num_blocks, self._journal)
        self._network = network
        self._ahead = ahead and role != "prefill" and store is None and traffic is None
        self._turn_at = float("inf")  # time of the I/O thread's next scheduled turn
        self._past: float | None = None  # the loop's time, while it is behind the world's
        self._step_end: float | None = None  # end of the step in flight
        self._step_at = 0.0  # time for which `_step_over` is scheduled
        self._look_at = float("inf")  # time of the loop's next scheduled turn without input
        layout = profile.kv_layout()
        line = SimLine(network, self.identity, self._ready)
        line.connect(PROXY, "")
        plane = _plane(network, self.identity, profile, sharing, self._ready)
        exchange = TransferExchange(
            self.identity,
            NAMESPACE,
            [plane],
            digests_of,
            PeerTransport(line.send, line.connect, line.disconnect),
            ChunkLimits(max(1, int(profile.chunk_mib * (1 << 20)) // layout.block_bytes)),
        )
        register = _register(name, role, profile, line.address, traffic)
        membership = Membership(register, (PROXY,), self._network.world.now)
        self._io = IoThread(line, membership, exchange, events, self._network.world.clock)
        self._delayed = DelayedIo(self._io, self.runner, network)
        self._store: Store = NO_STORE
        if store is not None:
            self._store = SimStore(store, self.identity, self._clock, self._hear)
            membership.set_store(store.identity)
        self.adapters_filled: Set[bytes] = frozenset()
        """Digests of all that were in a slot at some time."""
        adapters: Adapters = NO_ADAPTERS
        if traffic is not None:
            slots = SimSlots(network.world, traffic)
            self.adapters_filled = slots.filled
            adapters = sim_adapters(network.world, slots, traffic, self._clock, self._hear)
        parts = Parts(
            runner=self.runner,
            manager=manager,
            layout=layout,
            max_model_len=profile.max_model_len,
            io=self._delayed,
            prefixes=PrefixLoader(self._store, manager, layout, always=store_loads == "always"),
            clock=self._clock,
            adapters=adapters,
        )
        self.loop = _loop(parts, role, profile, policy)
        self._ready()

    @property
    def alive(self) -> bool:
        return self.identity in self._network.lines

    @property
    def load(self) -> Load:
        return self._delayed.load

    def drain(self) -> None:
        """SIGTERM."""
        self._io.terminate()
        self._ready()

    def kill(self) -> None:
        """SIGKILL: messages already sent arrive, and nothing else happens."""
        self._catch_up()
        self._delayed.late_tokens.flush_all()
        self._io.turn()
        self._network.remove(self.identity)
        self._store.close()

    # -- the I/O thread

    def _ready(self) -> None:
        """The I/O thread has input: schedule its turn at this instant, behind the events already due."""
        self._set_turn(self._network.world.now)

    def _hear(self, event: StoreEvent | AdapterRead) -> None:
        self._io.inbox.put(event)
        self._ready()

    def _set_turn(self, when: float) -> None:
        if when < self._turn_at:
            self._turn_at = when
            self._network.world.at(when, self._carry, when)

    def _carry(self, when: float) -> None:
        if when != self._turn_at or not self.alive:
            return  # an earlier turn replaced this one
        self._catch_up()
        self._delayed.late_tokens.flush()
        self._turn_at = float("inf")
        self._io.turn()
        self._set_turn(max(self._io.wake_at, self._network.world.now))
        if self._io.inbox.empty():
            return
        if self._step_end is None:
            self._work()
            self._set_step_over()
        else:
            self._set_step(self._step_end)

    # -- the loop's thread

    def _clock(self) -> float:
        return (self._network.world.now if self._past is None else self._past) + self.runner.step_s

    def _work(self) -> None:
        worked = self.loop.turn(0.0)
        if worked:
            self._step_end = self._clock() if self.runner.step_s else self._clock() + SOON_S
        elif self.load.running or self.load.waiting:
            self._set_look(self._network.world.now + max(SOON_S, self.loop.wait_s(LOOK_S)))

    def _set_step_over(self) -> None:
        """Schedule the next turn at the end of the step in flight, or of the last of the alike steps after it."""
        if self._step_end is None:
            return
        end = self._step_end
        if self._ahead and self.runner.step_s:
            for step_s in self.runner.alike(self._steady()):
                end += step_s
        self._set_step(end)

    def _set_step(self, when: float) -> None:
        if when != self._step_at:
            self._step_at = when
            self._network.world.at(when, self._step_over, when)

    def _step_over(self, when: float) -> None:
        if when == self._step_at and self.alive:
            self._catch_up()

    def _catch_up(self) -> None:
        """Process all steps that have ended by now, in order."""
        if self._step_end is None or self._step_end > self._network.world.now:
            return
        while self._step_end is not None and self._step_end <= self._network.world.now:
            self._past = stamp = self._step_end
            self._step_end = None
            self._delayed.step_is_over(stamp)
            if self._ahead and self._io.inbox.empty():
                self._past = self._skip(stamp)
            if self._journal.step_is_over():
                self._set_turn(self._network.world.now + FLUSH_EVERY_S)
            self._work()
        self._past = None
        self._set_step_over()
        if self._delayed.late_tokens.due:
            self._ready()

    def _steady(self) -> tuple[WorkerSequence, ...]:
        role = self.loop.role
        return role.steady if isinstance(role, DecodeRole) else ()

    def _skip(self, began_at: float) -> float:
        """Make up for steps that end by now and draw nothing but one more token each, all at once. Returns when the
        next step begins."""
        role, running = self.loop.role, self._steady()
        if not running or not isinstance(role, DecodeRole):
            return began_at
        ends = list(accumulate(self.runner.alike(running)[:-1], initial=began_at))
        count = bisect_right(ends, self._network.world.now) - 1
        lacking = sum(each.table.blocks_lacking(each.num_tokens + count - 1) for each in running)
        if not count or lacking > self._manager.num_available:
            return began_at
        stamps = ends[1 : count + 1]
        self.runner.skip([after - before for before, after in pairwise(ends[: count + 1])])
        for sequence in running:
            _advance(sequence, count)
            self._delayed.late_tokens.put_many(sequence.link, sequence.unsent_tokens("", None), stamps)
        role.counters.steps += count
        role.counters.generated_tokens += count * len(running)
        self._delayed.skipped(count, count * len(running), self._manager.num_available, ends[count - 1])
        return stamps[-1]

    def _set_look(self, when: float) -> None:
        if when < self._look_at:
            self._look_at = when
            self._network.world.at(when, self._look, when)

    def _look(self, when: float) -> None:
        if when != self._look_at:
            return  # an earlier one replaced this one
        self._look_at = float("inf")
        if self.alive and self._step_end is None:
            self._work()
            self._set_step_over()


def _advance(sequence: WorkerSequence, count: int) -> None:
    """What so many steps do to a sequence of which they draw one token each."""
    seed, num_tokens = sequence.sampling.seed, sequence.num_tokens + count
    sequence.table.grow(num_tokens - 1)
    sequence.token_ids += [token_of(seed, sequence.num_generated + number) for number in range(count)]
    sequence.restart(num_tokens - 1)
    sequence.table.publish(sequence.token_ids, num_tokens - 1)


def _plane(
    network: Network, identity: str, profile: Profile, sharing: Sharing | None, on_ready: Callable[[], None]
) -> Plane:
    """Of one GPU, or of the GPUs of all ranks of all stages, each with a link of its own."""
    layout = profile.kv_layout()
    if sharing is None:
        return SimPlane(network, identity, layout.block_bytes, on_ready)
    size, by_layer = sharing
    cut = Cut.even(layout.num_units, size.ranks, layout.num_layers, size.stages)
    row_bytes = layout.layer_bytes if by_layer else layout.unit_bytes
    ends = [SimPlane(network, rank_name(identity, number), row_bytes, on_ready) for number in range(size.gpus)]
    return ShardedPlane(cut, profile.num_blocks, ends, (lambda blocks: digests_of([blocks])[0]) if by_layer else None)


def _register(name: str, role: Role, profile: Profile, address: str, traffic: AdapterTraffic | None) -> Register:
    return Register(
        worker=name,
        incarnation=1,
        role=role,
        model=profile.name,
        namespace=NAMESPACE,
        block_tokens=profile.layout.block_tokens,
        total_blocks=profile.num_blocks,
        max_num_seqs=profile.max_num_seqs,
        max_model_len=profile.max_model_len,
        address=address,
        max_loras=0 if traffic is None else traffic.num_slots,
        max_lora_rank=RANK,
    )


def _loop(parts: Parts, role: Role, profile: Profile, policy: str) -> Loop:
    if role == "prefill":
        return prefill_loop(
            parts,
            PrefillSettings(
                max_num_seqs=profile.max_num_seqs,
                max_num_batched_tokens=profile.prefill_budget_tokens,
                max_chunk_tokens=profile.prefill_chunk_tokens,
                full_step_tokens=FULL_STEP_TOKENS,
                policy=policy,
            ),
            "cuda",
        )
    return decode_loop(
        parts,
        DecodeSettings(
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.decode_budget_tokens,
            max_chunk_tokens=profile.decode_chunk_tokens,
            mixed=role == "mixed",
        ),
        "cuda",
    )
