"""The loop of a decode worker: inbox, arrivals, schedule, step, tokens out.

It is the only writer of its sequences and of its block manager.

A sequence is reserved (its blocks are held, a transfer fills them), waiting (it has none: local prefill, or preempted)
or running. Its blocks go back through one of three doors: released (nobody else touches them), quarantined until the
carrier says that the transfer has ended, or kept as cached prefix. Every leg ends in exactly one of Tokens with a
finish, Busy, Failed and Cancelled.

Steps run ahead: up to the runner's `run_ahead` of them are launched before the first is read, so that a device never
waits for this loop; the last of them as late as it may be (pace.py), so that who arrives meanwhile is in it. What a
step draws for a sequence that turns out to have ended is dropped, and blocks that a launched step may still write into
rest with it until it was read.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import takewhile

from baton.decode.flight import Flight, Part
from baton.decode.launch_timer import LaunchTimer
from baton.decode.scheduler import DecodeLimits, Item, plan
from baton.decode.sequence import Sequence
from baton.decode.settings import DecodeSettings
from baton.decode.tally import Tally
from baton.kvtransfer.blocks.manager import OutOfBlocks
from baton.kvtransfer.blocks.table import BlockTable
from baton.kvtransfer.protocol.exchange import Incoming, KvArrived, ReceiverEnded
from baton.kvtransfer.store.client import NO_STORE, Store
from baton.kvtransfer.store.events import StoreClientDied, StoreFound, StoreLoaded, StoreWritten
from baton.models.batch import Draw, Row
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.leg import LegKey
from baton.node.membership import Joined, JoinRefused, ProxyLost
from baton.node.messages.control import (
    Bundle,
    Busy,
    Cancel,
    Cancelled,
    Drain,
    Failed,
    Load,
    Reserve,
    Reserved,
    Tokens,
)
from baton.node.telemetry import log_event
from baton.worker.draining import Draining
from baton.worker.io_thread import FromProxy, Inbound, IoThreadDied
from baton.worker.legs import busy, cancel_matches, failed, validation_error
from baton.worker.parts import Parts
from baton.worker.prefix_loading import LoadedPrefix, PrefixLoader
from baton.worker.stages import LegTimes
from baton.worker.stopping import finish_of, is_last

logger = logging.getLogger("decode")

IDLE_WAIT_S = 0.1


class DecodeWorker:
    """See the module's docstring."""

    def __init__(
        self,
        worker: Parts,
        settings: DecodeSettings,
        clock: Callable[[], float] = time.monotonic,
        store: Store = NO_STORE,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._settings = settings
        self._carrier = worker.carrier
        self._manager = worker.manager
        self._limits = DecodeLimits(
            block_tokens=worker.layout.block_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_chunk_tokens=settings.max_chunk_tokens,
        )
        self._reuse = PrefixLoader(store, worker.manager, worker.layout, always=settings.store_loads == "always")
        self._legs: dict[LegKey, Sequence] = {}
        self._reserved: dict[bytes, Sequence] = {}  # by transfer id
        self._waiting: list[Sequence] = []  # most senior first
        self._running: list[Sequence] = []  # most senior first
        self._flights: deque[Flight] = deque()  # in the order of their launch
        self._pace = LaunchTimer()
        self._prompting = False  # the next plan has a prompt that is new, or the rest of one
        self._free_slots = list(range(settings.max_num_seqs))
        self._tally = Tally.new(settings.max_num_batched_tokens)
        self._draining = Draining(settings.drain_s)

    def run(self) -> None:
        """Serve until drained."""
        worked = False
        while not self._draining.over(idle=self._idle, now=self._clock()):
            worked = self.turn(0.0 if worked else self.wait_s(IDLE_WAIT_S))
        for sequence in [*self._legs.values()]:
            self._end(sequence, failed(sequence.leg, "worker is shutting down", retryable=True))
        while self._flights:
            self._retire(self._flights.popleft())

    def turn(self, wait_s: float) -> bool:
        """Hear what came in, waiting at most `wait_s` for something; True if it computed or read something."""
        events, heard_at = self._carrier.receive(wait_s), self._clock()
        for event in events:
            self._on(event)
        self._expire(self._clock())
        self._reuse.tick(self._clock())
        worked = self._step()
        self._carrier.load = self._load()
        self._carrier.load_at = heard_at
        return worked

    def wait_s(self, longest_s: float) -> float:
        """How long it may wait for something to come in: before that the next step may be due, or what it awaits of the
        store be given up."""
        now = self._clock()
        if self._flights:
            longest_s = min(longest_s, max(0.0, self._launch_at - now))
        return self._reuse.wake_in_s(now, longest_s)

    def drain(self) -> None:
        """Take nothing new, end when all is done or the time is over."""
        if self._draining.begin(self._clock()):
            self._carrier.drain()
            log_event(logger, "draining", sequences=len(self._legs))

    # -- inbox

    def _on(self, event: Inbound) -> None:
        match event:
            case FromProxy(link, Reserve() as message, at):
                self._on_reserve(link, message, at)
            case FromProxy(link, Cancel() as message):
                for sequence in [s for s in self._legs.values() if cancel_matches(message, s.leg)]:
                    self._end(sequence, None)
                self._carrier.tell(link, Cancelled(request_id=message.request_id, attempt=message.attempt))
            case FromProxy(_, Drain()):
                self.drain()
            case KvArrived():
                self._on_arrived(event)
            case ReceiverEnded():
                self._on_receiver_ended(event)
            case ProxyLost(link):
                log_event(logger, "proxy_lost", link=link)
                for sequence in [s for s in self._legs.values() if s.link == link]:
                    self._end(sequence, failed(sequence.leg, "this worker had lost its proxy", retryable=True))
            case StoreFound() | StoreLoaded() | StoreWritten():
                if (loaded := self._reuse.on_event(event, self._clock())) is not None:
                    self._on_loaded(loaded)
            case Joined(link):
                log_event(logger, "joined", link=link)
            case JoinRefused(link, reason):
                raise SettingsError(f"{link} refused this worker: {reason}")
            case IoThreadDied(error):
                raise InvariantBroken("the carrier thread died") from error
            case StoreClientDied(error):
                raise InvariantBroken("the store's thread died") from error

    def _on_reserve(self, link: str, message: Reserve, at: float) -> None:
        leg = LegKey(message.request_id, message.attempt)
        if leg in self._legs:
            return
        if answer := self._refusal(leg, message):
            self._carrier.tell(link, answer)
            return
        body = message.body
        sequence = Sequence(
            leg=leg,
            link=link,
            token_ids=list(body.token_ids),
            prompt_len=body.prompt_len,
            sampling=body.sampling,
            priority=body.priority,
            deadline=self._clock() + body.deadline_s,
            table=BlockTable(self._manager, body.root, self._limits.block_tokens, body.block_hashes),
            times=LegTimes(at),
            told=len(body.token_ids) - body.prompt_len,
        )
        if message.prefill and not self._hold_blocks(sequence, message.prefill):
            self._carrier.tell(link, busy(leg, "too few free blocks"))
            return
        self._legs[leg] = sequence
        if not message.prefill:
            self._insert(self._waiting, sequence)
            self._prompting = True
            self._tally.local += sequence.num_tokens
        self._tally.prompts += sequence.num_tokens
        self._tally.cached += sequence.cached_tokens
        self._carrier.tell(
            link,
            Reserved(request_id=leg.request_id, attempt=leg.attempt, cached_tokens=sequence.cached_tokens),
        )

    def _refusal(self, leg: LegKey, message: Reserve) -> Busy | Failed | None:
        impossible = validation_error(
            message.body,
            max_model_len=self._worker.max_model_len,
            vocab_size=self._worker.runner.config.vocab_size,
            block_tokens=self._limits.block_tokens,
        )
        if impossible:
            return failed(leg, impossible, retryable=False)
        if self._draining.begun:
            return busy(leg, "draining")
        if message.prefill and len(self._running) + len(self._reserved) >= self._limits.max_num_seqs:
            return busy(leg, "all rows are taken")
        if len(self._legs) >= self._settings.max_waiting:
            return busy(leg, "queue is full")
        return None

    def _hold_blocks(self, sequence: Sequence, prefill: str) -> bool:
        """Cached prefix and blocks for the rest, all or none; then the transfer may come. Whoever was preempted, and
        what runs and must grow, goes before new reservations."""
        table = sequence.table
        sequence.cached_tokens = table.take_prefix(sequence.num_tokens)
        spare = self._settings.spare_blocks if self._running else 0
        lacking = table.blocks_lacking(sequence.num_tokens) + spare
        owed = sum(s.table.blocks_lacking(s.num_tokens + 1) for s in self._waiting)
        if lacking + owed > self._manager.num_available:
            table.release()
            return False
        sequence.first_missing_block = len(table.blocks)
        table.grow(sequence.num_tokens)
        sequence.transfer_id = secrets.token_bytes(16)
        self._reserved[sequence.transfer_id] = sequence
        incoming = Incoming(
            transfer_id=sequence.transfer_id,
            leg=sequence.leg,
            peer=prefill,
            first_block=sequence.first_missing_block,
            blocks=tuple(table.blocks[sequence.first_missing_block :]),
            deadline=sequence.deadline,
        )
        self._carrier.do(lambda exchange, now: exchange.open_receiver(incoming, now))
        return True

    def _on_arrived(self, event: KvArrived) -> None:
        sequence = self._reserved.pop(event.transfer_id, None)
        if sequence is None:  # it was cancelled while the last bytes came: nothing writes any more
            self._manager.end_quarantine(event.transfer_id)
            return
        sequence.transfer_id = b""
        sequence.times.arrive(event.at, event.wait_s, event.transfer_s)
        if event.token_id >= self._worker.runner.config.vocab_size:  # a peer of ours, but not in its right mind
            self._end(sequence, failed(sequence.leg, "the first token is outside the vocabulary", retryable=True))
            return
        sequence.num_computed = sequence.num_launched = sequence.num_tokens
        sequence.stored_blocks = sequence.num_computed // self._limits.block_tokens  # prefill offers these
        sequence.table.publish(sequence.token_ids, sequence.num_computed)
        sequence.append(event.token_id, event.logprob)
        self._enter(sequence)

    def _on_receiver_ended(self, event: ReceiverEnded) -> None:
        self._manager.end_quarantine(event.transfer_id)
        if (sequence := self._reserved.pop(event.transfer_id, None)) is not None:
            sequence.transfer_id = b""
            leg = sequence.leg
            if event.cancelled:  # by prefill: its own answer, such as a finish at the first token, is on its way
                self._end(sequence, Cancelled(request_id=leg.request_id, attempt=leg.attempt))
            else:
                self._end(sequence, failed(leg, f"transfer: {event.reason}", retryable=True))

    # -- steps

    def _step(self) -> bool:
        """Launch a step, and read one where enough are under way or none was launched; True if anything changed."""
        before, run_ahead = len(self._flights), self._worker.runner.run_ahead
        if before == run_ahead > 0 and self._clock() < self._launch_at:
            return False
        changed = self._launch()
        if self._flights and (len(self._flights) == before or len(self._flights) > run_ahead):
            self._retire(self._flights.popleft())
            return True
        return changed

    def _launch(self) -> bool:
        """Carry out one plan; True if it launched or changed anything."""
        planned_at = self._clock()
        if not self._running and not self._waiting:
            return False
        # Whoever was preempted while a step drew its next token waits for that token before it may come back.
        able = takewhile(lambda sequence: not sequence.num_pending, self._waiting)
        waiting = [sequence for sequence in able if not self._reuse.waits(sequence, self._clock())]
        decision = plan(
            [self._item(sequence) for sequence in self._running],
            [self._item(sequence) for sequence in waiting],
            self._manager.num_available,
            self._limits,
            len(self._reserved),
        )
        sequences = list(self._running)
        for index in decision.preempted:
            self._preempt(sequences[index])
        batch = [(sequences[step.number], step.length) for step in decision.steps]
        batch = [(sequence, length) for sequence, length in batch if self._grow(sequence, length)]
        admitted = sum(self._admit(sequence) for sequence in waiting[: decision.admitted])
        self._prompting = admitted > 0
        if batch:
            rows = [_row(sequence, length) for sequence, length in batch]
            parts = [Part(sequence, length, sequence.stay) for sequence, length in batch]
            began_at = self._clock()
            behind = bool(self._flights)
            self._flights.append(Flight(self._worker.runner.launch(rows), parts, began_at, behind))
            self._pace.launched(planned_at, self._clock(), behind, any(length > 1 for _, length in batch))
            self._tally.steps += 1
            for (sequence, length), row in zip(batch, rows, strict=True):
                sequence.num_launched += length
                sequence.num_pending += row.draw is not None
            self._prompting |= any(length > 1 and s.num_launched < s.num_expected - 1 for s, length in batch)
        return bool(batch or admitted or decision.preempted)

    def _item(self, sequence: Sequence) -> Item:
        """A sequence whose last token is drawn, though not read, has no work left; one that is loading has none yet."""
        num_tokens, num_generated = sequence.num_expected, sequence.num_expected - sequence.prompt_len
        drawn = sequence.num_pending > 0
        over = drawn and is_last(sequence.sampling, num_generated, num_tokens, self._worker.max_model_len)
        if over or self._reuse.loading(sequence.leg):
            num_tokens = sequence.num_launched
        return Item(num_tokens, sequence.num_launched, len(sequence.table.blocks))

    def _grow(self, sequence: Sequence, length: int) -> bool:
        try:
            sequence.table.grow(sequence.num_launched + length)
        except OutOfBlocks:
            return False
        return True

    def _on_loaded(self, loaded: LoadedPrefix) -> None:
        """A cache had so many blocks more. Whoever was preempted meanwhile has no use for them."""
        sequence = self._legs.get(loaded.leg)
        if sequence is None or sequence not in self._running:
            return
        num_tokens = self._reuse.take_in(sequence, loaded)
        self._prompting = True
        if not sequence.num_generated:
            sequence.cached_tokens += num_tokens
            sequence.times.tier_load_s = loaded.load_s
            sequence.times.loaded_tokens = loaded.tokens(self._limits.block_tokens)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix and blocks for all its tokens, and a row."""
        cached_tokens = sequence.table.take_prefix(sequence.num_tokens - 1)
        if not self._grow(sequence, sequence.num_tokens):
            sequence.table.release()
            return False
        sequence.num_computed = sequence.num_launched = cached_tokens
        if sequence.num_generated == sequence.told and not sequence.cached_tokens:
            sequence.cached_tokens = min(cached_tokens, sequence.prompt_len)
            self._tally.cached += sequence.cached_tokens
            self._tally.local_cached += sequence.cached_tokens
        self._waiting.remove(sequence)
        self._enter(sequence)
        self._reuse.begin(sequence, self._clock())
        return True

    def _enter(self, sequence: Sequence) -> None:
        """Make a sequence run; it gets a slot."""
        sequence.slot = self._free_slots.pop()
        self._insert(self._running, sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Make it run no more. Its slot is free at once, since steps follow one another; its blocks may be filled by
        transfers, which do not, so they rest until the last step that writes into them was read."""
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        blocks = sequence.table.part_with()
        flight = next((flight for flight in reversed(self._flights) if flight.computes(sequence)), None)
        if flight is None:
            self._manager.release(blocks)
        else:
            flight.left.append(blocks)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._reuse.drop(sequence.leg)
        sequence.asked = False
        sequence.num_computed = sequence.num_launched = 0
        sequence.stay += 1
        self._insert(self._waiting, sequence)
        self._tally.preemptions += 1

    def _retire(self, flight: Flight) -> None:
        """Take in what a step computed, and tell the proxies."""
        drawn = flight.launched.read()
        for blocks in flight.left:
            self._manager.release(blocks)
        now, took = self._clock(), flight.launched.device_time
        num_prompt_tokens = sum(part.length for part in flight.parts if part.length > 1)
        self._pace.ended(took, now, flight.behind, num_prompt_tokens > 0)
        if num_prompt_tokens:
            spent_s = took.busy_s if took else now - flight.began_at  # since then it may have waited behind another
            self._reuse.gate.computed(num_prompt_tokens, spent_s, now)
            self._tally.compute(num_prompt_tokens, spent_s)
        told: dict[str, list[Tokens]] = defaultdict(list)
        for part, token in zip(flight.parts, drawn, strict=True):
            sequence = part.sequence
            if self._legs.get(sequence.leg) is not sequence:
                continue  # it ended meanwhile
            if part.stay == sequence.stay:
                sequence.num_computed += part.length
                sequence.table.publish(sequence.token_ids, sequence.num_computed)
                self._reuse.write_behind(sequence)
            if sequence.times.open:
                sequence.times.begin(flight.began_at)
            if token is None:
                continue
            sequence.num_pending -= 1
            for place, token_id in enumerate(token.token_ids):
                sequence.append(token_id, token.logprobs[place] if token.logprobs else None)
                self._tally.generated += 1
                generated, known = sequence.num_generated, sequence.num_tokens
                finish = finish_of(token_id, sequence.sampling, generated, known, self._worker.max_model_len)
                if finish:
                    break
            stages = sequence.times.drew(flight.began_at, now) if sequence.times.open else None
            told[sequence.link].append(sequence.tell(finish, stages))
            if finish:
                self._reuse.used(sequence)
                self._end(sequence, None)
        for link, tokens in told.items():  # newcomers first: a proxy takes a bundle's tokens one by one
            self._carrier.tell(link, Bundle(tokens=tuple(sorted(tokens, key=lambda each: each.stages is None))))

    # -- endings

    def _end(self, sequence: Sequence, answer: Failed | Cancelled | None) -> None:
        """Forget a sequence, in whatever state, and hand its blocks back through the right door."""
        del self._legs[sequence.leg]
        self._reuse.drop(sequence.leg)
        if transfer_id := sequence.transfer_id:
            self._reserved.pop(transfer_id)
            sequence.table.quarantine_from(sequence.first_missing_block, transfer_id)
            self._carrier.do(lambda exchange, now: exchange.cancel_receiver(transfer_id, "cancelled", now))
        elif sequence in self._running:
            self._leave(sequence)
        else:
            sequence.table.release()
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        if answer is not None:
            self._carrier.tell(sequence.link, answer)

    def _expire(self, now: float) -> None:
        for sequence in [s for s in self._legs.values() if now >= s.deadline]:
            self._end(sequence, failed(sequence.leg, "deadline", retryable=False))

    # -- state

    def _insert(self, group: list[Sequence], sequence: Sequence) -> None:
        """Keep the order of seniority: priority first, then the order in which they came."""
        seniority = {leg: index for index, leg in enumerate(self._legs)}
        seniority.setdefault(sequence.leg, len(seniority))
        group.append(sequence)
        group.sort(key=lambda s: (-s.priority, seniority[s.leg]))

    def _load(self) -> Load:
        return Load(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._reserved),
            waiting_tokens=sum(s.num_tokens - s.num_computed for s in (*self._running, *self._waiting)),
            free_blocks=self._manager.num_available,
            total_blocks=self._manager.num_blocks,
            steps=self._tally.steps,
            prefill_tokens_s=self._tally.speed.tokens_s,
            counters={
                **self._tally.counters(),
                **self._pace.counters(),
                **self._reuse.counters(),
                "evictions": float(self._manager.evictions),
                **self._carrier.transfer_counters(),
            },
        )

    @property
    def _launch_at(self) -> float:
        """When the next step is, behind one under way: with parts of prompts in it at once, for that takes long."""
        return 0.0 if self._prompting else self._pace.launch_at

    @property
    def _idle(self) -> bool:
        return not self._legs and self._reuse.idle

    def check(self) -> None:
        """Prove the block accounting; when idle, that nothing is held."""
        self._manager.check()
        usage = self._manager.usage()
        if self._idle and usage.free + usage.cached + usage.quarantined != usage.total:
            raise InvariantBroken(f"an idle decode worker holds blocks: {usage}")


def _row(sequence: Sequence, length: int) -> Row:
    start = sequence.num_launched
    end = start + length
    draw = None
    if end == sequence.num_expected:
        num_generated = sequence.num_expected - sequence.prompt_len
        draw = Draw(sequence.sampling, sequence.token_ids, sequence.prompt_len, num_generated)
    return Row(sequence.token_ids[start:end], start, sequence.table.blocks, draw, sequence.slot)
