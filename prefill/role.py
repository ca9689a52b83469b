"""The role of a prefill worker: compute prompts in chunks under a budget, draw the first token, hand the KV over.

A sequence's blocks are referenced while it is computed and leased, under the leg's name, from then until the I/O thread
says that the transfer touches them no more. It knows no decode and no HTTP.
"""

from __future__ import annotations

from baton.kvtransfer.blocks.manager import OutOfBlocks
from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded, SenderEnded
from baton.models.batch import Drawn
from baton.node.counters import WorkerCounters
from baton.node.leg import LegKey
from baton.node.messages.control import Busy, Cancel, Cancelled, Failed, Prefill, Reserve
from baton.prefill.scheduler import LONG_PROMPT_STEPS, QueuedPrompt, ServiceRules, between_tenants, plan, service_order
from baton.prefill.settings import PrefillSettings, PrefillSizes
from baton.worker.hand_over import HandOvers
from baton.worker.in_flight import InFlightStep, InFlightSteps
from baton.worker.loop import Loop, RoleReport
from baton.worker.parts import Parts
from baton.worker.pending_prefixes import PendingPrefixes, work_left
from baton.worker.prefix_loading import LoadedPrefix
from baton.worker.sequence import Sequence, cancel_matches, failed, grammar_broken, transfer_failed
from baton.worker.stats import PromptSpeed


class PrefillRole:
    """Queue of prompts, chunks, hand-over."""

    name = "prefill"
    launch_at = 0.0

    def __init__(self, parts: Parts, sizes: PrefillSizes, policy: str) -> None:
        self.sequences: dict[LegKey, Sequence] = {}
        self.counters = WorkerCounters()
        self.steps = InFlightSteps(parts.runner, parts.manager, parts.clock)
        self._parts = parts
        self._sizes = sizes
        self._rules = ServiceRules(policy, sizes.max_chunk_tokens, sizes.full_step_tokens)
        self._block_tokens = parts.layout.block_tokens
        self._hand_overs = HandOvers(parts, self.steps)
        self._speed = PromptSpeed(min(sizes.worker.max_num_batched_tokens, sizes.full_step_tokens))
        self._computing_since = 0.0

    @property
    def idle(self) -> bool:
        return not self.sequences and self._hand_overs.idle

    # -- requests and transfers

    def accept(self, sequence: Sequence, message: Prefill | Reserve) -> Busy | Failed | None:
        leg = sequence.leg
        if not isinstance(message, Prefill):
            return failed(leg, "a prefill worker reserves nothing", retryable=False)
        if self._hand_overs.has(leg):
            return None  # a replay of what is computed already
        self.sequences[leg] = sequence
        if sequence.hands_over:
            self._hand_overs.open(sequence, message)
        return None

    def cancel(self, link: str, message: Cancel) -> None:
        own = [each for each in self.sequences.values() if each.link == link and cancel_matches(message, each.leg)]
        for sequence in own:
            self.end(sequence, None)
        self._hand_overs.cancel(link, message)

    def proxy_lost(self, link: str) -> None:
        self._hand_overs.proxy_lost(link)

    def end(self, sequence: Sequence, answer: Failed | Cancelled | None) -> None:
        self._drop(sequence, answer)
        if sequence.hands_over:
            self._hand_overs.give_up(sequence)
        else:
            self.steps.release(sequence)

    def on_event(self, event: SenderEnded | KvArrived | ReceiverEnded | LoadedPrefix) -> None:
        match event:
            case SenderEnded():
                self._on_sender_ended(event)
            case LoadedPrefix():
                self._on_loaded(event)

    def _on_sender_ended(self, event: SenderEnded) -> None:
        if (sequence := self.sequences.get(event.leg)) is not None:  # before all was computed
            self._drop(sequence, transfer_failed(event.leg, event.reason))
            self.steps.release(sequence)
        else:
            self._hand_overs.on_ended(event)

    def _on_loaded(self, loaded: LoadedPrefix) -> None:
        sequence = self.sequences.get(loaded.leg)
        if sequence is None:
            return
        sequence.cached_tokens += self._parts.prefixes.take_in(sequence, loaded)
        sequence.times.tier_load_s = loaded.load_s
        sequence.times.loaded_tokens = loaded.tokens(self._block_tokens)

    # -- steps

    def launch(self) -> bool:
        batch = self._plan()
        if not batch:
            return False
        for slot, (sequence, _) in enumerate(batch):
            sequence.slot = slot
        step = self.steps.launch(batch)
        self.counters.steps += 1
        if not step.behind:
            self._computing_since = step.began_at
        for sequence, _ in batch:
            sequence.times.begin(step.began_at)
        self._hand_overs.begin_checksums(step)
        return True

    def _plan(self) -> list[tuple[Sequence, int]]:
        """Start waiting prompts, in order, as far as blocks last; then fill the budget from those not loading."""
        now, sizes, prefixes = self._parts.clock(), self._sizes, self._parts.prefixes
        sequences = list(self.sequences.values())
        queue = [
            QueuedPrompt(s.num_tokens, s.num_launched, s.priority, now - s.times.received_at, s.cached_tokens)
            for s in sequences
        ]
        long = any(each.num_tokens > LONG_PROMPT_STEPS * sizes.full_step_tokens for each in sequences)
        meets_others = long and any(each.contended for each in sequences)
        rules = between_tenants(self._rules, self._speed.tokens_s) if meets_others else self._rules
        order = service_order(queue, rules)
        started: list[int] = []
        pending = PendingPrefixes(self._parts.manager)
        num_siblings = 0
        for index in order:
            sequence = sequences[index]
            if max(len(started), num_siblings) == sizes.worker.max_num_seqs:
                break
            if not sequence.table.blocks:
                if pending.awaited_by(sequence):
                    num_siblings += 1
                    continue
                if sequence.awaits_adapter or prefixes.waits(sequence, now):
                    continue
                if not self._start(sequence, now):
                    break  # no prompt overtakes one that waits for blocks
            started.append(index)
            pending.add(sequence)
        ready = [
            index
            for index in started
            if not (sequences[index].awaits_grammar or prefixes.loading(sequences[index].leg))
        ]
        queue = [QueuedPrompt(s.num_tokens, s.num_launched, s.priority, 0.0) for s in sequences]
        chunks = plan(queue, ready, sizes.worker.max_num_batched_tokens, rules.max_chunk_tokens, rules.full_step_tokens)
        return [(sequences[chunk.prompt], chunk.length) for chunk in chunks]

    def _start(self, sequence: Sequence, now: float) -> bool:
        """Take the cached prefix and blocks for all the rest, and load what pays; False if there are too few."""
        cached_tokens = sequence.table.take_prefix(sequence.num_cacheable)
        try:
            sequence.table.grow(sequence.num_tokens)
        except OutOfBlocks:
            sequence.table.release()
            return False
        sequence.restart(cached_tokens)
        sequence.cached_tokens = cached_tokens
        self.counters.prompt_tokens += sequence.num_tokens
        self.counters.prefix_queries_tokens += sequence.num_tokens
        self.counters.prefix_hits_tokens += cached_tokens
        self.counters.prompt_tokens_gpu += cached_tokens
        self._parts.prefixes.begin(sequence, now)
        return True

    def take_in(self, step: InFlightStep, drawn: list[Drawn | None]) -> None:
        checksums = step.read_checksums()
        self._measure(sum(part.length for part in step.parts))
        for link, messages in step.prompt_logprobs(self.sequences):
            self._parts.io.send(link, *messages)
        for part, token in zip(step.parts, drawn, strict=True):
            sequence = part.sequence
            if self.sequences.get(sequence.leg) is not sequence:
                continue  # it has ended
            sequence.num_computed += part.length
            sequence.table.publish(sequence.token_ids, sequence.num_computed)
            self._parts.prefixes.write_behind(sequence)
            if sequence.ends_with_prompt:
                self._end_with_prompt(sequence)
            elif token is None:
                if sequence.hands_over:
                    self._hand_overs.offer(sequence, checksums)
            elif self._hand_overs.complete(sequence, token, checksums):
                del self.sequences[sequence.leg]
            else:
                self.end(sequence, grammar_broken(sequence.leg))
        self._hand_overs.yield_gil()

    def _measure(self, num_tokens: int) -> None:
        """How fast prompts are computed, for the gate and the router."""
        now = self._parts.clock()
        spent_s, self._computing_since = now - self._computing_since, now
        self._speed.add_step(num_tokens, spent_s)
        self._parts.prefixes.gate.computed(num_tokens, spent_s, now)
        self.counters.prompt_tokens_computed += num_tokens

    # -- endings

    def _end_with_prompt(self, sequence: Sequence) -> None:
        """The request wanted no token: nothing was opened towards decode."""
        stages = sequence.times.prefilled(self._parts.clock())
        self._parts.io.send(sequence.link, sequence.unsent_tokens("length", stages))
        self._parts.prefixes.used(sequence)
        del self.sequences[sequence.leg]
        self.steps.release(sequence)

    def _drop(self, sequence: Sequence, answer: Failed | Cancelled | None) -> None:
        """Remove a sequence that is not computed to its end."""
        del self.sequences[sequence.leg]
        self._parts.prefixes.drop(sequence.leg)
        if answer is not None:
            self._parts.io.send(sequence.link, answer)

    # -- state

    def report(self) -> RoleReport:
        started = [sequence for sequence in self.sequences.values() if sequence.table.blocks]
        waiting = [sequence for sequence in self.sequences.values() if not sequence.table.blocks]
        return RoleReport(
            running=len(started),
            waiting=len(waiting),
            waiting_tokens=work_left(self._parts.manager, started, waiting),
            prefill_tokens_s=self._speed.tokens_s,
        )


def prefill_loop(parts: Parts, settings: PrefillSettings, device: str) -> Loop:
    """The loop of a prefill worker on "cpu" or "cuda"."""
    sizes = settings.sizes(device, parts.runner.config.full_step_tokens)
    role = PrefillRole(parts, sizes, settings.policy)
    return Loop(parts, role, max_waiting=settings.max_waiting, drain_s=settings.drain_s)
