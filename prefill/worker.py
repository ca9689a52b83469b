"""The loop of a prefill worker: inbox, schedule, step, hand over. The only writer of its jobs and its block manager.

A job's blocks are referenced while it is computed and leased, under the leg's name, from then until the carrier says
that nobody touches them any more. Every leg ends in exactly one of HandedOver, Tokens with a finish, Busy, Failed and
Cancelled.

Up to the runner's `run_ahead` steps are launched before the first is read, so that a device never waits for this loop.
No job ends while a launched step computes it: the steps under way are read first.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from baton.kvtransfer.blocks.manager import OutOfBlocks
from baton.kvtransfer.blocks.table import BlockTable
from baton.kvtransfer.protocol.exchange import SenderEnded
from baton.kvtransfer.store.client import NO_STORE, Store
from baton.kvtransfer.store.events import StoreClientDied, StoreFound, StoreLoaded, StoreWritten
from baton.models.batch import Draw, Drawn, Launched, Row
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.leg import LegKey
from baton.node.membership import Joined, JoinRefused, ProxyLost
from baton.node.messages.control import (
    Busy,
    Cancel,
    Cancelled,
    Drain,
    Failed,
    HandedOver,
    Load,
    Prefill,
    Tokens,
)
from baton.node.telemetry import log_event
from baton.prefill.job import Job
from baton.prefill.scheduler import Chunk, QueuedPrompt, order, plan
from baton.prefill.settings import PrefillSettings
from baton.worker.draining import Draining
from baton.worker.io_thread import FromProxy, Inbound, IoThreadDied
from baton.worker.legs import busy, cancel_matches, failed, validation_error
from baton.worker.parts import NoChecksums, Parts, StepChecksums
from baton.worker.prefix_loading import LoadedPrefix, PrefixLoader
from baton.worker.speed import PromptSpeed
from baton.worker.stages import LegTimes
from baton.worker.stopping import finish_of

logger = logging.getLogger("prefill")

IDLE_WAIT_S = 0.1
HAND_OVER_S = 0.001
"""While the device is at a step, the loop leaves the interpreter to a hand-over, so long at most, before it launches
more."""


class _Flight(NamedTuple):
    """A step that was launched and not read yet."""

    launched: Launched
    read_sums: Callable[[], dict[int, bytes]]
    chunks: list[tuple[Job, Chunk]]


class PrefillWorker:
    """See the module's docstring."""

    def __init__(
        self,
        worker: Parts,
        settings: PrefillSettings,
        clock: Callable[[], float] = time.monotonic,
        store: Store = NO_STORE,
        sums: StepChecksums | None = None,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._settings = settings
        self._carrier = worker.carrier
        self._manager = worker.manager
        self._jobs: dict[LegKey, Job] = {}  # in order of arrival
        self._leased: dict[LegKey, Job] = {}  # computed or given up; the carrier still reads their blocks
        self._owed: set[LegKey] = set()  # of those, the legs whose proxy awaits the outcome
        self._sums = sums or NoChecksums()
        self._flights: deque[_Flight] = deque()  # in the order of their launch
        self._reuse = PrefixLoader(store, worker.manager, worker.layout, always=settings.store_loads == "always")
        self._speed = PromptSpeed(settings.max_num_batched_tokens)
        self._computing_since = 0.0
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._computed_tokens = 0
        self._draining = Draining(settings.drain_s)
        self._arrived_at: dict[LegKey, float] = {}

    def run(self) -> None:
        """Serve until drained."""
        worked = False
        while not self._draining.over(idle=self._idle, now=self._clock()):
            worked = self.turn(0.0 if worked else self.wait_s(IDLE_WAIT_S))
        self._settle()
        for job in [*self._jobs.values()]:
            self._give_up(job, failed(job.leg, "worker is shutting down", retryable=True))

    def turn(self, wait_s: float) -> bool:
        """Hear what came in, waiting at most `wait_s` for something; True if it computed or read something."""
        events, heard_at = self._carrier.receive(wait_s), self._clock()
        for event in events:
            self._on(event)
        self._expire(self._clock())
        self._reuse.tick(self._clock())
        chunks = self._schedule()
        if chunks:
            self._launch(chunks)
        if due := bool(self._flights) and (not chunks or len(self._flights) > self._worker.runner.run_ahead):
            self._retire()
        self._carrier.load = self._load()
        self._carrier.load_at = heard_at
        return due or bool(chunks)

    def wait_s(self, longest_s: float) -> float:
        """How long it may wait for something to come in: what it awaits of the store may be given up before."""
        return self._reuse.wake_in_s(self._clock(), longest_s)

    def drain(self) -> None:
        """Take nothing new, end when all is done or the time is over."""
        if self._draining.begin(self._clock()):
            self._carrier.drain()
            log_event(logger, "draining", jobs=len(self._jobs), transfers=len(self._leased))

    # -- inbox

    def _on(self, event: Inbound) -> None:
        match event:
            case FromProxy(link, Prefill() as message, at):
                self._on_prefill(link, message, at)
            case FromProxy(link, Cancel() as message):
                self._on_cancel(link, message)
            case FromProxy(_, Drain()):
                self.drain()
            case SenderEnded():
                self._on_sender_ended(event)
            case StoreFound() | StoreLoaded() | StoreWritten():
                if (loaded := self._reuse.on_event(event, self._clock())) is not None:
                    self._on_loaded(loaded)
            case ProxyLost(link):
                log_event(logger, "proxy_lost", link=link)
                self._settle()
                for job in [job for job in self._jobs.values() if job.link == link]:
                    self._give_up(job, failed(job.leg, "this worker had lost its proxy", retryable=True))
            case Joined(link):
                log_event(logger, "joined", link=link)
            case JoinRefused(link, reason):
                raise SettingsError(f"{link} refused this worker: {reason}")
            case IoThreadDied(error):
                raise InvariantBroken("the carrier thread died") from error
            case StoreClientDied(error):
                raise InvariantBroken("the store's thread died") from error

    def _on_prefill(self, link: str, message: Prefill, at: float) -> None:
        leg = LegKey(message.request_id, message.attempt)
        if leg in self._jobs or leg in self._leased:
            return
        if answer := self._refusal(leg, message):
            self._carrier.tell(link, answer)
            return
        now, body = self._clock(), message.body
        job = Job(
            leg=leg,
            link=link,
            token_ids=body.token_ids,
            prompt_len=body.prompt_len,
            sampling=body.sampling,
            priority=body.priority,
            deadline=now + body.deadline_s,
            table=BlockTable(self._manager, body.root, self._worker.layout.block_tokens, body.block_hashes),
            times=LegTimes(at),
        )
        job.foreseen = self._manager.peek(job.table.names(job.num_tokens - 1)) * job.table.block_tokens
        self._jobs[leg] = job
        self._arrived_at[leg] = now
        self._carrier.do(
            lambda exchange, now: exchange.open_sender(leg, message.decode, message.decode_address, job.deadline, now)
        )

    def _refusal(self, leg: LegKey, message: Prefill) -> Busy | Failed | None:
        impossible = validation_error(
            message.body,
            max_model_len=self._worker.max_model_len,
            vocab_size=self._worker.runner.config.vocab_size,
            block_tokens=self._worker.layout.block_tokens,
        )
        if impossible:
            return failed(leg, impossible, retryable=False)
        if self._draining.begun:
            return busy(leg, "draining")
        if len(self._jobs) >= self._settings.max_waiting:
            return busy(leg, "queue is full")
        return None

    def _on_cancel(self, link: str, message: Cancel) -> None:
        if any(cancel_matches(message, leg) for leg in self._jobs):
            self._settle()
        for job in [j for j in self._jobs.values() if cancel_matches(message, j.leg)]:
            self._give_up(job, None)
        for leg in [leg for leg in self._owed if cancel_matches(message, leg)]:
            self._owed.discard(leg)
            self._cancel_sender(leg, "cancelled")
        self._carrier.tell(link, Cancelled(request_id=message.request_id, attempt=message.attempt))

    def _on_sender_ended(self, event: SenderEnded) -> None:
        if event.leg in self._jobs:
            self._settle()
        if (job := self._jobs.get(event.leg)) is not None:  # before all was computed
            self._give_up(job, failed(job.leg, f"transfer: {event.reason}", retryable=True), ended=True)
            return
        leased = self._leased.pop(event.leg, None)
        if leased is None:
            return
        self._manager.end_lease(_lease_key(event.leg))
        if event.leg in self._owed:
            self._owed.discard(event.leg)
            self._carrier.tell(leased.link, self._outcome(event))

    def _outcome(self, event: SenderEnded) -> HandedOver | Failed:
        if not event.ok:
            return failed(event.leg, f"transfer: {event.reason}", retryable=True)
        sent_bytes = event.sent_blocks * self._worker.layout.block_bytes
        return HandedOver(
            request_id=event.leg.request_id,
            attempt=event.leg.attempt,
            sent_bytes=sent_bytes,
            transfer_s=event.transfer_s,
        )

    # -- steps

    def _schedule(self) -> list[tuple[Job, Chunk]]:
        """Start waiting jobs, in order, as far as blocks last; then fill the budget from those that are not loading."""
        now = self._clock()
        jobs = list(self._jobs.values())
        works = [QueuedPrompt(j.num_tokens, j.num_launched, j.priority, now - self._arrived_at[j.leg]) for j in jobs]
        sequence = order(works, self._settings.policy)
        started: list[int] = []
        coming: set[bytes] = set()  # blocks that the started ones will make
        num_siblings = 0
        for index in sequence:
            if max(len(started), num_siblings) == self._settings.max_num_seqs:
                break
            if not jobs[index].started:
                if self._lacks(jobs[index]) in coming:
                    num_siblings += 1
                    continue  # it would compute what another computes already
                if self._reuse.waits(jobs[index], now):
                    continue
                if not self._start(jobs[index], now):
                    break  # nobody overtakes a job that waits for blocks
            started.append(index)
            coming.update(jobs[index].coming)
        ready = [index for index in started if not self._reuse.loading(jobs[index].leg)]
        works = [QueuedPrompt(j.num_tokens, j.num_launched, j.priority, 0.0) for j in jobs]
        settings = self._settings
        sizes = settings.max_num_batched_tokens, settings.max_chunk_tokens, settings.full_step_tokens
        return [(jobs[chunk.index], chunk) for chunk in plan(works, ready, *sizes)]

    def _lacks(self, job: Job) -> bytes:
        """The name of its first block that is not in the pool; empty if all are."""
        names = job.table.names(job.num_tokens - 1)
        first = self._manager.peek(names)
        return names[first] if first < len(names) else b""

    def _start(self, job: Job, now: float) -> bool:
        """Take the cached prefix and blocks for all the rest, and load what pays; False if there are too few."""
        cached_tokens = job.table.take_prefix(job.num_tokens - 1)
        try:
            job.table.grow(job.num_tokens)
        except OutOfBlocks:
            job.table.release()
            return False
        job.started = True
        job.num_computed = job.num_launched = job.cached_tokens = cached_tokens
        self._cached_tokens += cached_tokens
        self._prompt_tokens += job.num_tokens
        self._reuse.begin(job, now)
        return True

    def _on_loaded(self, loaded: LoadedPrefix) -> None:
        """A cache had so many blocks more."""
        job = self._jobs.get(loaded.leg)
        if job is None:
            return
        job.cached_tokens += self._reuse.take_in(job, loaded)
        job.times.tier_load_s = loaded.load_s
        job.times.loaded_tokens = loaded.tokens(self._worker.layout.block_tokens)

    def _launch(self, chunks: list[tuple[Job, Chunk]]) -> None:
        rows = [_row(job, chunk, slot) for slot, (job, chunk) in enumerate(chunks)]
        began_at = self._clock()
        if not self._flights:
            self._computing_since = began_at
        for job, _ in chunks:
            job.times.begin(began_at)
        launched = self._worker.runner.launch(rows)
        completed = [block for job, chunk in chunks for block in _completed(job, chunk)]
        self._flights.append(_Flight(launched, self._sums.begin(completed), chunks))
        self._steps += 1
        for job, chunk in chunks:
            job.num_launched = chunk.start + chunk.length

    def _settle(self) -> None:
        """Read all steps that are under way."""
        while self._flights:
            self._retire()

    def _retire(self) -> None:
        """Read the oldest step, and tell what it computed."""
        launched, read_sums, chunks = self._flights.popleft()
        drawn, sums = launched.read(), read_sums()
        self._measure(sum(chunk.length for _, chunk in chunks))
        for (job, chunk), token in zip(chunks, drawn, strict=True):
            job.num_computed = chunk.start + chunk.length
            job.table.publish(job.token_ids, job.num_computed)
            self._reuse.write_behind(job)
            if token is None:
                self._tell_blocks(job, job.num_computed // self._worker.layout.block_tokens, sums)
            else:
                self._hand_over(job, token, sums)
        if self._flights and any(token is not None for token in drawn):
            self._carrier.let_work(HAND_OVER_S)

    def _measure(self, num_tokens: int) -> None:
        """How fast prompts are computed, for the gate and the router."""
        now = self._clock()
        self._speed.step(num_tokens, now - self._computing_since)
        self._reuse.gate.computed(num_tokens, now - self._computing_since, now)
        self._computing_since = now
        self._computed_tokens += num_tokens

    def _tell_blocks(self, job: Job, num_blocks: int, sums: dict[int, bytes]) -> None:
        leg, blocks = job.leg, tuple(job.table.blocks[:num_blocks])
        own = {block: sums[block] for block in blocks if block in sums}
        self._carrier.do(lambda exchange, now: exchange.tell_blocks(leg, blocks, own, now))

    def _hand_over(self, job: Job, token: Drawn, sums: dict[int, bytes]) -> None:
        """The prompt is computed: its first token goes to the proxy at once, and after the KV to decode."""
        leg, index = job.leg, job.num_tokens - job.prompt_len
        (token_id,) = token.token_ids  # a prompt's last row is no draft: one token follows it
        finish = finish_of(token_id, job.sampling, index + 1, job.num_tokens + 1, self._worker.max_model_len)
        self._carrier.tell(
            job.link,
            Tokens(
                request_id=leg.request_id,
                attempt=leg.attempt,
                index=index,
                ids=(token_id,),
                logprobs=token.logprobs,
                finish=finish,
                cached_tokens=min(job.cached_tokens, job.prompt_len),
                stages=job.times.prefilled(self._clock()),
            ),
        )
        if finish:
            self._cancel_sender(leg, "finished at its first token")
        else:
            self._tell_blocks(job, len(job.table.blocks), sums)
            logprob = token.logprobs[0] if token.logprobs else None
            self._carrier.do(lambda exchange, now: exchange.tell_token(leg, token_id, logprob, now))
            self._owed.add(leg)
        self._reuse.used(job)
        self._lease(job)

    # -- endings

    def _give_up(self, job: Job, answer: Failed | None, *, ended: bool = False) -> None:
        """A job that is not computed to its end. `ended`: its sender has ended, so nobody reads its blocks."""
        if answer is not None:
            self._carrier.tell(job.link, answer)
        self._reuse.drop(job.leg)
        if ended:
            self._forget(job)
            job.table.release()
        else:
            self._cancel_sender(job.leg, "cancelled")
            self._lease(job)

    def _lease(self, job: Job) -> None:
        self._forget(job)
        job.table.lease(_lease_key(job.leg))
        self._leased[job.leg] = job

    def _forget(self, job: Job) -> None:
        del self._jobs[job.leg]
        del self._arrived_at[job.leg]

    def _cancel_sender(self, leg: LegKey, reason: str) -> None:
        self._carrier.do(lambda exchange, now: exchange.cancel_sender(leg, reason, now))

    def _expire(self, now: float) -> None:
        if any(now >= job.deadline for job in self._jobs.values()):
            self._settle()
        for job in [job for job in self._jobs.values() if now >= job.deadline]:
            self._give_up(job, failed(job.leg, "deadline", retryable=False))

    # -- state

    def _load(self) -> Load:
        running = sum(job.started for job in self._jobs.values())
        return Load(
            running=running,
            waiting=len(self._jobs) - running,
            waiting_tokens=sum(job.num_tokens - max(job.num_computed, job.foreseen) for job in self._jobs.values()),
            free_blocks=self._manager.num_available,
            total_blocks=self._manager.num_blocks,
            steps=self._steps,
            prefill_tokens_s=self._speed.tokens_s,
            counters={
                "prompt_tokens": float(self._prompt_tokens),
                "prefix_queries_tokens": float(self._prompt_tokens),
                "prefix_hits_tokens": float(self._cached_tokens),
                "prompt_tokens_gpu": float(self._cached_tokens),
                "prompt_tokens_computed": float(self._computed_tokens),
                **self._reuse.counters(),
                "evictions": float(self._manager.evictions),
                **self._carrier.transfer_counters(),
            },
        )

    @property
    def _idle(self) -> bool:
        return not self._jobs and not self._leased and self._reuse.idle

    def check(self) -> None:
        """Prove the block accounting; when idle, that nothing is held."""
        self._manager.check()
        usage = self._manager.usage()
        if self._idle and usage.free + usage.cached != usage.total:
            raise InvariantBroken(f"an idle prefill worker holds blocks: {usage}")


def _completed(job: Job, chunk: Chunk) -> list[int]:
    """Blocks that are final when the chunk is computed, and were not before."""
    end, size = chunk.start + chunk.length, job.table.block_tokens
    return job.table.blocks[chunk.start // size : None if end == job.num_tokens else end // size]


def _row(job: Job, chunk: Chunk, slot: int) -> Row:
    end = chunk.start + chunk.length
    draw = None
    if end == job.num_tokens:
        draw = Draw(job.sampling, job.token_ids, job.prompt_len, job.num_tokens - job.prompt_len)
    return Row(job.token_ids[chunk.start : end], chunk.start, job.table.blocks, draw, slot)


def _lease_key(leg: LegKey) -> bytes:
    return f"{leg.request_id}/{leg.attempt}".encode()
