"""The loop of a worker, whatever its role: inbox, refusals, deadlines, steps, the report of its load, draining.

It is the only writer of its sequences and of its block manager. A `WorkerRole` holds what prefill and decode each do in
their own way: which requests it takes, what the next step computes, what becomes of the tokens that were drawn.

Every leg ends in exactly one terminal message: Tokens with a finish, HandedOver, Busy, Failed or Cancelled. Up to the
runner's `run_ahead` steps are launched before the first is read, so that a device never waits for this loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded, SenderEnded
from baton.kvtransfer.store.events import StoreClientDied, StoreFound, StoreLoaded, StoreWritten
from baton.models.batch import Drawn
from baton.node.counters import WorkerCounters, values
from baton.node.errors import InvariantBroken
from baton.node.leg import LegKey
from baton.node.membership import HEARTBEAT_S, Joined, JoinRefused, ProxyLost
from baton.node.messages.control import (
    MAX_ADAPTERS,
    Busy,
    Cancel,
    Cancelled,
    DispatchBody,
    Drain,
    Failed,
    Load,
    LoadAdapter,
    Prefill,
    Reserve,
)
from baton.node.telemetry import log_event
from baton.worker.adapter_slots import AdapterRead
from baton.worker.constraint import GrammarCompiled
from baton.worker.in_flight import InFlightStep, InFlightSteps
from baton.worker.io_thread import FromProxy, Inbound, IoThreadDied, RankLost, Terminated
from baton.worker.parts import Parts
from baton.worker.prefix_loading import LoadedPrefix
from baton.worker.sequence import Sequence, busy, failed

IDLE_WAIT_S = 0.1
DRAIN_NOTICE_S = 2 * HEARTBEAT_S
"""Even an idle worker stays so long: a request that was sent before the proxy knew gets its Busy, not silence."""
ID_IN_USE = "another proxy has a request of this id"
LOAD_LEAD_S = 0.02
"""The load is built this long before a heartbeat is due, or two turns before, if that is earlier."""


class RoleReport(NamedTuple):
    """What a role says of its queue."""

    running: int
    waiting: int
    waiting_tokens: int
    prefill_tokens_s: float


class WorkerRole(Protocol):
    """What prefill and decode each do in their own way. The loop calls it from one thread."""

    name: str
    sequences: dict[LegKey, Sequence]
    """Those that have not ended, in the order of their arrival; the role adds and removes them."""
    steps: InFlightSteps

    @property
    def counters(self) -> WorkerCounters: ...

    @property
    def launch_at(self) -> float:
        """When to launch the next step behind one in flight; 0: at once."""
        ...

    @property
    def idle(self) -> bool:
        """Whether it holds no block and owes no answer."""
        ...

    def accept(self, sequence: Sequence, message: Prefill | Reserve) -> Busy | Failed | None:
        """Take on a sequence, or say why not."""
        ...

    def cancel(self, link: str, message: Cancel) -> None:
        """End what the message names of that link's requests, without an answer."""
        ...

    def end(self, sequence: Sequence, answer: Failed | Cancelled | None) -> None:
        """Remove a sequence in whatever state, send its answer and give its blocks back."""
        ...

    def proxy_lost(self, link: str) -> None:
        """The proxy at that link awaits nothing more; its sequences have ended."""
        ...

    def on_event(self, event: SenderEnded | KvArrived | ReceiverEnded | LoadedPrefix) -> None:
        """A transfer or a load has ended."""
        ...

    def launch(self) -> bool:
        """Plan the next step and launch it; whether that changed anything."""
        ...

    def take_in(self, step: InFlightStep, drawn: list[Drawn | None]) -> None:
        """Take in what a step has computed and drawn."""
        ...

    def report(self) -> RoleReport: ...


class Draining:
    """How a worker leaves: it waits until its work has ended and the proxies know, at most `longest_s`."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._begun_at: float | None = None

    @property
    def begun(self) -> bool:
        return self._begun_at is not None

    def begin(self, now: float) -> bool:
        """Begin to leave; False if it has begun before."""
        first = self._begun_at is None
        if first:
            self._begun_at = now
        return first

    def is_over(self, idle: bool, now: float) -> bool:
        """Whether to go now: nothing is left and the proxies know, or the time is up."""
        if self._begun_at is None:
            return False
        waited_s = now - self._begun_at
        return waited_s >= self._longest_s or (idle and waited_s >= DRAIN_NOTICE_S)


class Loop:
    """Runs one role on the parts of a worker until it is drained.

    `max_waiting`: most requests in the worker; `drain_s`: time that they get to end once it drains.
    """

    def __init__(self, parts: Parts, role: WorkerRole, *, max_waiting: int, drain_s: float) -> None:
        self.role = role
        self._parts = parts
        self._clock = parts.clock
        self._max_waiting = max_waiting
        self._draining = Draining(drain_s)
        self._expire_at = float("inf")  # no deadline is earlier
        self.turned_at = parts.clock()
        """When the last turn ended."""
        self._logger = logging.getLogger(role.name)

    def run(self) -> None:
        """Serve until drained."""
        worked = False
        while not self.drained:
            worked = self.turn(0.0 if worked else self.wait_s(IDLE_WAIT_S))
        self._end_those(lambda sequence: True, "worker is shutting down", retryable=True)
        while self.role.steps:
            self.role.take_in(*self.role.steps.read())

    def turn(self, wait_s: float) -> bool:
        """Handle what came in, waiting at most `wait_s` for something; True if it computed or read something."""
        inbound, received_at = self._parts.io.receive(wait_s), self._clock()
        for event in inbound:
            self._on(event)
        now = self._clock()
        if now >= self._expire_at:
            self._expire(now)
        self._parts.prefixes.tick(now)
        worked = self._step()
        self._report_load(received_at)
        return worked

    def wait_s(self, longest_s: float) -> float:
        """How long a turn may wait for something to come in: a step or the end of a load may be due before."""
        now = self._clock()
        if self.role.steps:
            longest_s = min(longest_s, max(0.0, self.role.launch_at - now))
        longest_s = self._parts.adapters.wake_in_s(longest_s)
        return self._parts.prefixes.wake_in_s(now, longest_s)

    def drain(self) -> None:
        """Take nothing new; end when all is done or the time is over."""
        if self._draining.begin(self._clock()):
            self._parts.io.drain()
            log_event(self._logger, "draining", sequences=len(self.role.sequences))

    @property
    def drained(self) -> bool:
        """It was to drain, and has nothing left or no more time."""
        return self._draining.is_over(self.idle, self._clock())

    @property
    def idle(self) -> bool:
        return self.role.idle and self._parts.prefixes.idle

    def check(self) -> None:
        """Prove the block accounting; when idle, that nothing is held."""
        self._parts.manager.check()
        usage = self._parts.manager.usage()
        if self.idle and usage.free + usage.cached + usage.quarantined != usage.total:
            raise InvariantBroken(f"an idle {self.role.name} worker holds blocks: {usage}")

    # -- inbox

    def _on(self, event: Inbound) -> None:
        match event:
            case FromProxy(link, Prefill() | Reserve() as message, at):
                self._on_request(link, message, at)
            case FromProxy(link, Cancel() as message):
                self.role.cancel(link, message)
                self._parts.io.send(link, Cancelled(request_id=message.request_id, attempt=message.attempt))
            case FromProxy(link, LoadAdapter() as message):
                if (loaded_now := self._parts.adapters.load(link, message)) is not None:
                    self._parts.io.send(link, loaded_now)
            case AdapterRead():
                self._on_adapter(event)
            case FromProxy(_, Drain()) | Terminated():
                self.drain()
            case SenderEnded() | KvArrived() | ReceiverEnded():
                self.role.on_event(event)
            case StoreFound() | StoreLoaded() | StoreWritten():
                if (loaded := self._parts.prefixes.on_event(event, self._clock())) is not None:
                    self.role.on_event(loaded)
            case GrammarCompiled():
                self._on_grammar(event)
            case ProxyLost(link):
                log_event(self._logger, "proxy_lost", link=link)
                self._end_those(lambda sequence: sequence.link == link, "this worker lost its proxy", retryable=True)
                self.role.proxy_lost(link)
            case Joined(link):
                log_event(self._logger, "joined", link=link)
            case JoinRefused(link, reason, pause_s):
                log_event(
                    self._logger, "join_refused", level=logging.WARNING, link=link, reason=reason, again_in_s=pause_s
                )
            case IoThreadDied(error):
                raise InvariantBroken("the I/O thread died") from error
            case RankLost(reason):
                raise InvariantBroken(f"the worker has lost a rank: {reason}")
            case StoreClientDied(error):
                raise InvariantBroken("the store's thread died") from error

    def _on_request(self, link: str, message: Prefill | Reserve, at: float) -> None:
        leg = LegKey(message.request_id, message.attempt)
        if (known := self.role.sequences.get(leg)) is not None and known.link == link:
            return
        answer = self._refusal(leg, message.body) if known is None else failed(leg, ID_IN_USE, retryable=True)
        if answer is None:
            parts, now = self._parts, self._clock()
            sequence = Sequence.of(message, link, at, now, parts.manager, parts.layout.block_tokens)
            self._expire_at = min(self._expire_at, sequence.deadline)
            if sequence.adapter is not None and (reason := parts.adapters.want(sequence.adapter)):
                parts.io.send(link, busy(leg, reason))
                return
            grammar = sequence.sampling.grammar
            if grammar is not None and (constraint := parts.grammars.compile(grammar)) is not None:
                sequence.constrain(constraint)
            answer = self.role.accept(sequence, message)
        if answer is not None:
            self._parts.io.send(link, answer)

    def _refusal(self, leg: LegKey, body: DispatchBody) -> Busy | Failed | None:
        parts = self._parts
        error = validation_error(
            body,
            max_model_len=parts.max_model_len,
            vocab_size=parts.runner.config.vocab_size,
            block_tokens=parts.layout.block_tokens,
        )
        if error:
            return failed(leg, error, retryable=False)
        if self._draining.begun:
            return busy(leg, "draining")
        if len(self.role.sequences) >= self._max_waiting:
            return busy(leg, "queue is full")
        return None

    def _on_grammar(self, event: GrammarCompiled) -> None:
        waiting = [each for each in self.role.sequences.values() if each.awaits_grammar]
        for sequence in [each for each in waiting if each.sampling.grammar == event.grammar]:
            if event.error:
                self.role.end(sequence, failed(sequence.leg, f"grammar: {event.error}", retryable=False))
            elif (constraint := self._parts.grammars.constraint(event)) is not None:
                sequence.constrain(constraint)

    def _on_adapter(self, event: AdapterRead) -> None:
        for link, answer in self._parts.adapters.take_in(event):
            self._parts.io.send(link, answer)
        if event.error:
            self._end_those(
                lambda each: each.awaits_adapter and each.adapter is not None and each.adapter.digest == event.digest,
                f"adapter: {event.error}",
                retryable=True,
            )

    def _expire(self, now: float) -> None:
        self._end_those(lambda sequence: now >= sequence.deadline, "deadline", retryable=False)
        self._expire_at = min((each.deadline for each in self.role.sequences.values()), default=float("inf"))

    def _end_those(self, ends: Callable[[Sequence], bool], reason: str, *, retryable: bool) -> None:
        for sequence in [each for each in self.role.sequences.values() if ends(each)]:
            self.role.end(sequence, failed(sequence.leg, reason, retryable=retryable))

    # -- steps

    def _step(self) -> bool:
        """Launch a step, and read one where enough are in flight or none was launched; True if anything changed."""
        role, steps = self.role, self.role.steps
        before, run_ahead = len(steps), self._parts.runner.run_ahead
        if before == run_ahead > 0 and self._clock() < role.launch_at:
            return False
        self._parts.adapters.assign(role.sequences, steps.adapter_slots)
        changed = role.launch()
        self._complete()
        while steps and (len(steps) == before or len(steps) > run_ahead or steps.awaits_masks):
            role.take_in(*steps.read())
            self._complete()
            changed, before = True, -1
        return changed

    def _complete(self) -> None:
        """Give the newest step its masks, if it awaits some and all steps before it were read."""
        counters, steps = self.role.counters, self.role.steps
        if steps.awaits_masks and len(steps) == 1:
            counters.mask_seconds += steps.complete(self._parts.grammars)
            counters.masked_steps += 1

    # -- load

    def _report_load(self, received_at: float) -> None:
        """Give the load to the next heartbeat if that is due before another turn has surely ended."""
        now = self._clock()
        turn_s, self.turned_at = now - self.turned_at, now
        if now + max(2 * turn_s, LOAD_LEAD_S) >= self._parts.io.heartbeat_at:
            self._parts.io.report(self._load(), received_at)

    def _load(self) -> Load:
        parts, report, counters = self._parts, self.role.report(), self.role.counters
        counters.evictions = parts.manager.evictions
        adapters = parts.adapters
        in_slots, in_memory = adapters.in_slots[:MAX_ADAPTERS], adapters.in_memory[:MAX_ADAPTERS]
        adapters.counters.adapters_in_slots, adapters.counters.adapters_in_memory = len(in_slots), len(in_memory)
        return Load(
            running=report.running,
            waiting=report.waiting,
            waiting_tokens=report.waiting_tokens,
            free_blocks=parts.manager.num_available,
            total_blocks=parts.manager.num_blocks,
            steps=counters.steps,
            prefill_tokens_s=report.prefill_tokens_s,
            adapters=in_slots,
            adapters_in_memory=in_memory,
            counters=values(
                counters,
                *parts.prefixes.counters,
                parts.io.transfer_counters,
                parts.grammars.counters,
                adapters.counters,
            ),
        )


def validation_error(body: DispatchBody, *, max_model_len: int, vocab_size: int, block_tokens: int) -> str:
    """The reason why no worker of this model can serve the request, or ""."""
    num_tokens = len(body.token_ids)
    if not 0 < num_tokens < max_model_len:
        return f"{num_tokens} tokens; this worker takes 1 to {max_model_len - 1}"
    if not 0 < body.prompt_len <= num_tokens:
        return f"a prompt of {body.prompt_len} in {num_tokens} tokens"
    if max(body.token_ids) >= vocab_size:
        return "a token id is outside the vocabulary"
    if len(body.block_hashes) > num_tokens // block_tokens:
        return "more block hashes than full blocks"
    return ""
