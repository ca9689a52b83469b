"""The role of a decode worker: reservations, admission, preemption, tokens out. It knows no prefill and no HTTP.

A sequence is reserved (its blocks are held, a transfer fills them), waiting (it has none: local prefill, or preempted)
or running. Its blocks go back in one of three ways: released once no step computes them, quarantined until the I/O
thread says that the transfer has ended, or kept as cached prefix.

A mixed worker also computes prompts for others. These have their blocks and a claim on a row from the start, come
before all other sequences and are never preempted: so no two workers wait for each other's rows or blocks.

Steps run ahead, the last of them launched as late as the device allows (launch_timer), so that requests that arrive
meanwhile are in it. What a step draws for a sequence that turns out to have ended is dropped.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import takewhile

from baton.decode.launch_timer import LaunchTimer
from baton.decode.queues import Queues
from baton.decode.reservations import Reservations
from baton.decode.scheduler import DecodeLimits, Item, PlannedRow, plan
from baton.decode.settings import DecodeSettings, DecodeSizes
from baton.decode.speculation import Speculation
from baton.decode.step_meter import StepMeter
from baton.kvtransfer.blocks.manager import OutOfBlocks
from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded, SenderEnded
from baton.models.batch import Drawn
from baton.node.counters import DecodeCounters
from baton.node.leg import LegKey
from baton.node.messages.base import FinishReason
from baton.node.messages.control import Bundle, Busy, Cancel, Cancelled, Failed, Prefill, Reserve, Reserved, Tokens
from baton.worker.hand_over import HandOvers
from baton.worker.in_flight import InFlightStep, InFlightSteps
from baton.worker.loop import Loop, RoleReport
from baton.worker.parts import Parts
from baton.worker.pending_prefixes import PendingPrefixes, cacheable_names, work_left
from baton.worker.prefix_loading import LoadedPrefix
from baton.worker.sequence import Sequence, busy, cancel_matches, failed, grammar_broken, transfer_failed
from baton.worker.stopping import finish_of, is_last


class DecodeRole:
    """Reservations, continuous batching with preemption, streams of tokens."""

    def __init__(
        self,
        parts: Parts,
        sizes: DecodeSizes,
        spare_blocks: int,
        name: str = "decode",
        most_drafts: int = 0,
        draft_reach: int = 0,
    ) -> None:
        """`name`: that of the role, "decode" or "mixed". `most_drafts`: that a step verifies for one sequence;
        `draft_reach`: places behind them that proposing writes."""
        self.name = name
        self.sequences: dict[LegKey, Sequence] = {}
        self.counters = DecodeCounters()
        self.steps = InFlightSteps(parts.runner, parts.manager, parts.clock)
        self._hand_overs = HandOvers(parts, self.steps)
        self._parts = parts
        self._limits = DecodeLimits(
            block_tokens=parts.layout.block_tokens,
            max_num_seqs=sizes.worker.max_num_seqs,
            max_num_batched_tokens=sizes.worker.max_num_batched_tokens,
            max_chunk_tokens=sizes.max_chunk_tokens,
            full_step_tokens=sizes.full_step_tokens,
        )
        self._spare_blocks = spare_blocks
        self._queues = Queues(self.sequences, sizes.worker.max_num_seqs)
        self._reservations = Reservations(parts)
        self._speculation = Speculation(most_drafts, draft_reach, parts.max_model_len, self.counters)
        self._timer = LaunchTimer()
        most_tokens = max(sizes.max_chunk_tokens, sizes.full_step_tokens)
        most_prompt_tokens = min(sizes.worker.max_num_batched_tokens, most_tokens)
        self._meter = StepMeter(self.counters, parts.prefixes.gate, most_prompt_tokens)
        self._prompt_is_next = False  # the next plan has a prompt that is new, or the rest of one

    @property
    def launch_at(self) -> float:
        """A step with chunks of prompts is launched at once, for that takes the host long."""
        return 0.0 if self._prompt_is_next else self._timer.launch_at

    @property
    def idle(self) -> bool:
        return not self.sequences and self._hand_overs.idle

    @property
    def steady(self) -> tuple[Sequence, ...]:
        """The running sequences, while all that the next step does is to draw a token for each; else none."""
        running = self._queues.running
        alike = (each.num_expected - each.num_launched == 1 and not each.times.open for each in running)
        return tuple(running) if not self._queues.waiting and all(alike) else ()

    # -- requests and transfers

    def accept(self, sequence: Sequence, message: Prefill | Reserve) -> Busy | Failed | None:
        if isinstance(message, Prefill):
            return self._accept_prompt(sequence, message)
        leg = sequence.leg
        if message.prefill and len(self._reservations) + self._queues.num_promised >= self._limits.max_num_seqs:
            return busy(leg, "all rows are taken")
        if message.prefill and not self._reserve(sequence, message.prefill):
            return busy(leg, "too few free blocks")
        self.sequences[leg] = sequence
        if not message.prefill:
            self._queues.wait(sequence)
            self._prompt_is_next = True
            self.counters.local_prefill_tokens += sequence.num_tokens
        self._count_prompt(sequence)
        reserved = Reserved(request_id=leg.request_id, attempt=leg.attempt, cached_tokens=sequence.cached_tokens)
        self._parts.io.send(sequence.link, reserved)
        return None

    def _accept_prompt(self, sequence: Sequence, message: Prefill) -> Busy | Failed | None:
        """A prompt whose answer is another worker's."""
        leg = sequence.leg
        if self.name != "mixed":
            return failed(leg, "a decode worker hands nothing over", retryable=False)
        if self._hand_overs.has(leg):
            return None  # a replay of what is computed already
        if len(self._reservations) + self._queues.num_handing_over >= self._limits.max_num_seqs:
            return busy(leg, "all rows are taken")
        if sequence.hands_over:
            if not self._take_blocks(sequence):
                return busy(leg, "too few free blocks")
            sequence.cached_tokens = 0  # it is counted when the prompt begins
            self._hand_overs.open(sequence, message)
        self.sequences[leg] = sequence
        self._queues.wait(sequence)
        self._prompt_is_next = True
        self._count_prompt(sequence)
        return None

    def _count_prompt(self, sequence: Sequence) -> None:
        self.counters.prompt_tokens += sequence.num_tokens
        self.counters.prefix_queries_tokens += sequence.num_tokens
        self.counters.prefix_hits_tokens += sequence.cached_tokens

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Cached prefix and blocks for the rest, all or none. Preempted sequences, and the growth of running ones, go
        before."""
        table = sequence.table
        cached_tokens = table.take_prefix(sequence.num_cacheable if sequence.hands_over else sequence.num_tokens)
        spare = self._spare_blocks if self._queues.running else 0
        lacking = table.blocks_lacking(sequence.num_tokens) + spare
        owed = sum(s.table.blocks_lacking(s.num_tokens + 1) for s in self._queues.waiting if not s.hands_over)
        if lacking + owed > self._parts.manager.num_available:
            table.release()
            return False
        table.grow(sequence.num_tokens)
        sequence.cached_tokens = cached_tokens
        return True

    def _reserve(self, sequence: Sequence, prefill: str) -> bool:
        """Blocks for all that is known, or none; then the transfer may come."""
        if not self._take_blocks(sequence):
            return False
        self._reservations.open(sequence, prefill)
        return True

    def cancel(self, link: str, message: Cancel) -> None:
        own = [each for each in self.sequences.values() if each.link == link and cancel_matches(message, each.leg)]
        for sequence in own:
            self.end(sequence, None)
        self._hand_overs.cancel(link, message)

    def end(self, sequence: Sequence, answer: Failed | Cancelled | None) -> None:
        del self.sequences[sequence.leg]
        self._parts.prefixes.drop(sequence.leg)
        if (incoming := sequence.incoming) is not None:
            self._reservations.cancel(sequence, incoming)
        elif sequence.hands_over:
            self._queues.remove(sequence)
            self._hand_overs.give_up(sequence)
        elif sequence in self._queues.running:
            self._stop_running(sequence)
        else:
            sequence.table.release()
            if sequence in self._queues.waiting:
                self._queues.remove(sequence)
        if answer is not None:
            self._parts.io.send(sequence.link, answer)

    def proxy_lost(self, link: str) -> None:
        self._hand_overs.proxy_lost(link)

    def on_event(self, event: SenderEnded | KvArrived | ReceiverEnded | LoadedPrefix) -> None:
        match event:
            case KvArrived():
                self._on_arrived(event)
            case ReceiverEnded():
                self._on_receiver_ended(event)
            case SenderEnded():
                self._on_sender_ended(event)
            case LoadedPrefix():
                self._on_loaded(event)

    def _on_arrived(self, event: KvArrived) -> None:
        if (sequence := self._reservations.arrived(event)) is None:
            return
        sequence.times.arrive(event.at, event.wait_s, event.transfer_s)
        if event.token_id >= self._parts.runner.config.vocab_size:
            self.end(sequence, failed(sequence.leg, "the first token is outside the vocabulary", retryable=True))
            return
        sequence.restart(sequence.num_tokens)
        sequence.stored_blocks = sequence.num_computed // self._limits.block_tokens  # prefill offers these
        sequence.table.publish(sequence.token_ids, sequence.num_computed)
        sequence.append(event.token_id, event.logprob)
        self._run(sequence)
        if sequence.broke_grammar:
            self.end(sequence, grammar_broken(sequence.leg))

    def _on_receiver_ended(self, event: ReceiverEnded) -> None:
        if (sequence := self._reservations.ended(event)) is not None:
            leg = sequence.leg
            if event.cancelled:  # by prefill: its own answer, such as a finish at the first token, is on its way
                self.end(sequence, Cancelled(request_id=leg.request_id, attempt=leg.attempt))
            else:
                self.end(sequence, transfer_failed(leg, event.reason))

    def _on_sender_ended(self, event: SenderEnded) -> None:
        sequence = self.sequences.get(event.leg)
        if sequence is None:
            self._hand_overs.on_ended(event)
        elif sequence.hands_over:  # before all was computed
            del self.sequences[event.leg]
            self._parts.prefixes.drop(event.leg)
            self._queues.remove(sequence)
            self.steps.release(sequence)
            self._parts.io.send(sequence.link, transfer_failed(event.leg, event.reason))

    def _on_loaded(self, loaded: LoadedPrefix) -> None:
        """The store had more blocks of a prefix. A sequence that was preempted meanwhile has no use for them."""
        sequence = self.sequences.get(loaded.leg)
        if sequence is None or sequence not in self._queues.running:
            return
        num_tokens = self._parts.prefixes.take_in(sequence, loaded)
        self._prompt_is_next = True
        if not sequence.num_generated:
            sequence.cached_tokens += num_tokens
            sequence.times.tier_load_s = loaded.load_s
            sequence.times.loaded_tokens = loaded.tokens(self._limits.block_tokens)

    # -- steps

    def launch(self) -> bool:
        clock, prefixes = self._parts.clock, self._parts.prefixes
        planned_at = clock()
        if not self._queues.running and not self._queues.waiting:
            return False
        running, waiting = list(self._queues.running), self._ready(planned_at)
        items = [self._item(sequence) for sequence in running]
        decision = plan(
            items,
            [self._waiting_item(sequence) for sequence in waiting],
            self._parts.manager.num_available,
            self._limits,
            len(self._reservations),
        )
        for index in decision.preempted:
            self._preempt(running[index])
        batch = [
            (running[row.item], row.length)
            for row in decision.rows
            if _prepare(running[row.item], row, items[row.item])
        ]
        admitted = [each for each in zip(waiting, decision.admitted, strict=False) if self._admit(each[0])]
        batch += [(sequence, length) for sequence, length in admitted if length and not prefixes.loading(sequence.leg)]
        has_prompts = any(length > 1 for _, length in batch)
        if batch:
            step = self.steps.launch(batch)
            self._hand_overs.begin_checksums(step)
            self._timer.launched(planned_at, clock(), step.behind, has_prompts)
            self.counters.steps += 1
        self._prompt_is_next = (has_prompts or bool(admitted)) and any(map(self._has_chunks_left, self._queues.running))
        return bool(batch or admitted or decision.preempted)

    def _has_chunks_left(self, sequence: Sequence) -> bool:
        return sequence.num_expected - sequence.num_launched > 1 and not self._parts.prefixes.loading(sequence.leg)

    def _ready(self, now: float) -> list[Sequence]:
        """The waiting ones that may be admitted: of those with one prefix only the first, until it is computed."""
        if not self._queues.waiting:
            return []
        ready: list[Sequence] = []
        pending = PendingPrefixes(self._parts.manager)
        for sequence in self._queues.running:
            pending.add(sequence)
        # A sequence that was preempted while a step drew its next token comes back after that token was read.
        for sequence in takewhile(lambda each: not each.num_pending, self._queues.waiting):
            waits = sequence.awaits_grammar or sequence.awaits_adapter or pending.awaited_by(sequence)
            if not (waits or self._parts.prefixes.waits(sequence, now)):
                ready.append(sequence)
                pending.add(sequence)
        return ready

    def _item(self, sequence: Sequence) -> Item:
        """A sequence whose last token is drawn, though not read, has no work left; one that is loading has none yet."""
        num_tokens = sequence.num_expected
        drawn = sequence.num_pending > 0
        over = drawn and (
            sequence.hands_over
            or is_last(sequence.sampling, num_tokens - sequence.prompt_len, num_tokens, self._parts.max_model_len)
        )
        if over or sequence.awaits_grammar or sequence.awaits_adapter or self._parts.prefixes.loading(sequence.leg):
            num_tokens = sequence.num_launched
        return Item(num_tokens, sequence.num_launched, len(sequence.table.blocks), *self._speculation.drafts(sequence))

    def _waiting_item(self, sequence: Sequence) -> Item:
        """It has no block of its own yet, or all that it needs: a token that is handed over is stored elsewhere. What
        the pool has of it need not be computed."""
        cached_blocks = self._parts.manager.peek(cacheable_names(sequence))
        own_blocks = len(sequence.table.blocks) + 1 if sequence.hands_over else 0
        return Item(sequence.num_tokens, cached_blocks * self._limits.block_tokens, own_blocks)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix and blocks for all its tokens, and a row. More may be cached by now
        of one that has blocks."""
        sequence.table.release()
        cached_tokens = sequence.table.take_prefix(sequence.num_cacheable)
        if not _grow(sequence, sequence.num_tokens):
            sequence.table.release()
            return False
        sequence.restart(cached_tokens)
        if sequence.num_generated == sequence.num_sent and not sequence.cached_tokens:
            sequence.cached_tokens = min(cached_tokens, sequence.prompt_len)
            self.counters.prefix_hits_tokens += sequence.cached_tokens
            self.counters.prompt_tokens_gpu += sequence.cached_tokens
        self._queues.remove(sequence)
        self._run(sequence)
        self._parts.prefixes.begin(sequence, self._parts.clock())
        return True

    def _run(self, sequence: Sequence) -> None:
        """Give a sequence a slot and let it run."""
        self._speculation.begin(sequence)
        self._queues.run(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        """Its slot is free at once, since steps follow one another; its blocks may be filled by transfers, which do
        not."""
        self._queues.remove(sequence)
        self.steps.release(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._parts.prefixes.drop(sequence.leg)
        sequence.store_asked = False
        sequence.restart(0)
        sequence.preemption_epoch += 1
        self._queues.wait(sequence)
        self.counters.preemptions += 1

    def take_in(self, step: InFlightStep, drawn: list[Drawn | None]) -> None:
        now, began_at, checksums = self._parts.clock(), step.began_at, step.read_checksums()
        live, prefixes = self.sequences, self._parts.prefixes
        num_prompt_tokens = sum(part.length for part in step.parts if part.length > 1)
        self._timer.ended(step.launched.device_time, now, num_prompt_tokens > 0)
        self._meter.ended(step, num_prompt_tokens, now)
        bundles: dict[str, list[Tokens]] = defaultdict(list)
        for link, messages in step.prompt_logprobs(self.sequences):
            self._parts.io.send(link, *messages)
        for part, token in zip(step.parts, drawn, strict=True):
            sequence = part.sequence
            if live.get(sequence.leg) is not sequence:
                continue  # it has ended
            before = sequence.num_tokens
            finish: FinishReason = ""
            if token is not None and not sequence.hands_over:
                finish = self._append(sequence, token)
            if part.epoch == sequence.preemption_epoch:
                sequence.advance(part.length, max(0, sequence.num_tokens - before - 1))
                sequence.table.publish(sequence.token_ids, sequence.num_computed)
                prefixes.write_behind(sequence)
                if part.length > 1 and self._queues.waiting:
                    self._prompt_is_next = True  # one may have waited for this prefix
            if sequence.times.open:
                sequence.times.begin(began_at)
            if sequence.hands_over:
                self._take_in_prompt(sequence, token, checksums)
                continue
            if token is None:
                if not sequence.ends_with_prompt:
                    continue
                finish = "length"
            if sequence.broke_grammar:
                self.end(sequence, grammar_broken(sequence.leg))
                continue
            stages = sequence.times.drew(began_at, now) if sequence.times.open else None
            bundles[sequence.link].append(sequence.unsent_tokens(finish, stages))
            if finish:
                prefixes.used(sequence)
                self._speculation.finish(sequence)
                self.end(sequence, None)
        for link, tokens in bundles.items():  # newcomers first: a proxy takes a bundle's tokens one by one
            self._parts.io.send(link, Bundle(tokens=tuple(sorted(tokens, key=lambda each: each.stages is None))))
        self._hand_overs.yield_gil()

    def _take_in_prompt(self, sequence: Sequence, token: Drawn | None, checksums: dict[int, bytes]) -> None:
        """A part of a prompt that another worker waits for."""
        if token is None:
            self._hand_overs.offer(sequence, checksums)
        elif self._hand_overs.complete(sequence, token, checksums):
            self._queues.remove(sequence)
            del self.sequences[sequence.leg]
        else:
            self.end(sequence, grammar_broken(sequence.leg))

    def _append(self, sequence: Sequence, drawn: Drawn) -> FinishReason:
        """Append what one row drew, up to a token that ends the sequence, and say how that ends it."""
        sequence.num_pending -= 1
        finish: FinishReason = ""
        before = sequence.num_tokens
        for place, token_id in enumerate(drawn.token_ids):
            sequence.append(token_id, drawn.logprobs[place] if drawn.logprobs else None)
            num_generated, num_tokens = sequence.num_generated, sequence.num_tokens
            finish = finish_of(token_id, sequence.sampling, num_generated, num_tokens, self._parts.max_model_len)
            if finish:
                break
        num_appended = sequence.num_tokens - before
        self.counters.generated_tokens += num_appended
        if drawn.num_drafts:
            self._speculation.verified(sequence, drawn, num_appended)
        return finish

    # -- state

    def report(self) -> RoleReport:
        running, waiting = self._queues.running, self._queues.waiting
        self._speculation.report(running)
        return RoleReport(
            running=len(running),
            waiting=len(waiting) + len(self._reservations),
            waiting_tokens=work_left(self._parts.manager, running, waiting),
            prefill_tokens_s=self._meter.prompt_tokens_s,
        )


def decode_role(parts: Parts, settings: DecodeSettings, device: str) -> DecodeRole:
    """The role of a decode worker on "cpu" or "cuda"."""
    return DecodeRole(
        parts,
        settings.sizes(device),
        settings.spare_blocks,
        settings.role,
        settings.most_drafts,
        settings.draft_reach,
    )


def decode_loop(parts: Parts, settings: DecodeSettings, device: str) -> Loop:
    """The loop of a decode worker on "cpu" or "cuda"."""
    role = decode_role(parts, settings, device)
    return Loop(parts, role, max_waiting=settings.max_waiting, drain_s=settings.drain_s)


def _prepare(sequence: Sequence, row: PlannedRow, item: Item) -> bool:
    """Give a running sequence blocks for the row; False if there are none. Drafts in flight may have come before it."""
    sequence.most_drafts = row.num_drafts
    reach = item.draft_reach if row.num_drafts else 0
    return _grow(sequence, item.num_computed + item.num_drafting + row.length + row.num_drafts + reach)


def _grow(sequence: Sequence, num_tokens: int) -> bool:
    try:
        sequence.table.grow(num_tokens)
    except OutOfBlocks:
        return False
    return True
