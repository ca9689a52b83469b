"""One sequence in a worker: what is known of it, how far it is computed, and the messages that it sends.

`num_computed` advances when a step was read, a cache was hit or a transfer arrived; preemption sets it back. It knows
no queue, no schedule and no clock.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.blocks.table import BlockTable
from baton.kvtransfer.protocol.receiver import Incoming
from baton.models.batch import Draw, PromptTargets, Row
from baton.node.counters import MOST_DRAFTS
from baton.node.leg import LegKey
from baton.node.messages.base import FinishReason
from baton.node.messages.control import (
    MAX_PROMPT_LOGPROBS,
    AdapterRef,
    Busy,
    Cancel,
    Failed,
    Logprob,
    Prefill,
    PromptLogprob,
    PromptLogprobs,
    Reserve,
    SamplingSpec,
    Stages,
    Tokens,
)
from baton.worker.constraint import Constraint
from baton.worker.draft_record import DraftRecord
from baton.worker.stats import StageTimes

MOST_FORCED = 2 * (MOST_DRAFTS + 1)
"""Tokens of a step in flight and of the one behind it."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence of tokens, of which the first `num_computed` have their KV in the pool.

    Steps that were launched and not read yet run ahead: they compute up to `num_launched`, and draw `num_pending`
    tokens whose ids are not known yet. They may verify up to `num_drafting` drafts besides, and both be so many more.
    """

    leg: LegKey
    link: str
    """The link to the proxy that sent it."""
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingSpec
    priority: int
    deadline: float
    table: BlockTable
    times: StageTimes
    num_scored: int
    """The first `num_scored` tokens of the prompt need no log probability of this leg (any more)."""
    contended: bool = False
    """Prompts of other tenants may come, and must not wait for it for long."""
    hands_over: bool = False
    """Its prompt is computed here, and its answer by another worker."""
    num_computed: int = 0
    num_launched: int = 0
    num_pending: int = 0
    num_drafting: int = 0
    most_drafts: int = 0
    """Drafts that the next step may verify, if it computes one token."""
    prediction: tuple[int, ...] = ()
    """Tokens of which the client says that they may follow the prompt."""
    past_answers: tuple[int, ...] = ()
    """Tokens that followed similar prompts."""
    speculates: bool = True
    """Its draws may be drafted: the client allows it."""
    num_predicted: int = 0
    """Of the tokens that were not sent yet, those that were drafts from the prediction."""
    draft_record: DraftRecord = field(default_factory=DraftRecord)
    slot: int = 0
    """Its place in the runner's memory while it runs."""
    adapter: AdapterRef | None = None
    """All its tokens are computed with it."""
    adapter_slot: int | None = None
    """The runner's slot that has its adapter."""
    preemption_epoch: int = 0
    """How often it was preempted: what an earlier epoch's step computed has gone with the blocks."""
    cached_tokens: int = 0
    """Prompt tokens that a cache had."""
    store_asked: bool = False
    """The host's store was asked for its prefix since it last had blocks."""
    stored_blocks: int = 0
    """The first `stored_blocks` blocks need not be offered to the store (any more)."""
    num_sent: int = 0
    """Generated tokens that the proxy has, counted from the end of the prompt."""
    logprobs: list[Logprob] = field(default_factory=list)
    """Of the tokens that were not sent yet."""
    incoming: Incoming | None = None
    """The transfer that fills its blocks, until it has ended."""
    constraint: Constraint | None = None
    """Of a sequence with a grammar, once that is compiled."""

    @classmethod
    def of(
        cls,
        message: Prefill | Reserve,
        link: str,
        received_at: float,
        now: float,
        manager: BlockManager,
        block_size: int,
    ) -> Sequence:
        """A sequence without blocks, as the proxy describes it; `block_size` in tokens."""
        body = message.body
        return cls(
            leg=LegKey(message.request_id, message.attempt),
            link=link,
            token_ids=list(body.token_ids),
            prompt_len=body.prompt_len,
            sampling=body.sampling,
            priority=body.priority,
            deadline=now + body.deadline_s,
            table=BlockTable(manager, body.root, block_size, body.block_hashes),
            times=StageTimes(received_at),
            num_scored=_num_scored(message),
            contended=body.contended,
            hands_over=isinstance(message, Prefill) and body.sampling.max_tokens > 0,
            num_sent=len(body.token_ids) - body.prompt_len,
            speculates=body.speculate,
            prediction=body.prediction_ids,
            adapter=body.adapter,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_expected(self) -> int:
        """Known tokens, and those that launched steps draw."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_cacheable(self) -> int:
        """Tokens whose KV may come from a cache: one is left to compute, for what it draws. Positions that a cache has
        give no log probabilities, so that it ends before the first that is wanted."""
        return (self.num_scored if self.num_scored < self.prompt_len else len(self.token_ids)) - 1

    def row(self, length: int) -> Row:
        """The next `length` tokens as a row of a step. It draws if none of the known tokens is left after it."""
        start = self.num_launched
        end = start + length
        expected = len(self.token_ids) + self.num_pending
        draw, drafts = None, 0
        if end == expected and self.draws:
            num_generated, drafted = expected - self.prompt_len, (self.prediction, self.past_answers)
            drafts = self.most_drafts if length == 1 and num_generated else 0
            forced = self.forced if drafts else ()
            draw = Draw(self.sampling, self.token_ids, self.prompt_len, num_generated, *drafted, forced)
        targets = self._targets(start, end) if start < self.prompt_len and self.num_scored < self.prompt_len else None
        following = self.token_ids[end] if end < len(self.token_ids) else None
        assert not self.awaits_adapter, f"{self.leg} computes without its adapter"
        tokens, blocks, adapter = self.token_ids[start:end], self.table.blocks, self.adapter_slot
        return Row(tokens, start, blocks, draw, self.slot, targets, drafts, adapter=adapter, following=following)

    def _targets(self, start: int, end: int) -> PromptTargets | None:
        """Tokens of the prompt that follow tokens number start .. end - 1 and have no log probability yet."""
        first, last = max(self.num_scored, start + 1), min(end + 1, self.prompt_len)
        num_top = self.sampling.prompt_logprobs or 0
        return PromptTargets(first - 1 - start, self.token_ids[first:last], num_top) if first < last else None

    def score(self, first: int, entries: tuple[PromptLogprob, ...]) -> list[PromptLogprobs]:
        """The messages with log probabilities of tokens number `first` and those behind it.

        Without those that were sent already: a preempted sequence computes some twice.
        """
        begin = self.num_scored
        assert first <= begin, f"log probabilities from token {first} on, {begin} is next"
        new = entries[begin - first :]
        self.num_scored += len(new)
        return [
            PromptLogprobs(
                request_id=self.leg.request_id,
                attempt=self.leg.attempt,
                first=begin + offset,
                entries=new[offset : offset + MAX_PROMPT_LOGPROBS],
            )
            for offset in range(0, len(new), MAX_PROMPT_LOGPROBS)
        ]

    @property
    def draws(self) -> bool:
        """Tokens follow the prompt."""
        return self.sampling.max_tokens > 0

    @property
    def ends_with_prompt(self) -> bool:
        """The prompt is computed and nothing is to be drawn."""
        return not self.draws and self.num_computed == len(self.token_ids)

    @property
    def forced(self) -> abc.Sequence[int]:
        """Tokens behind the known ones that its grammar allows alone, as many as steps in flight and the next take."""
        return () if self.constraint is None else self.constraint.forced[:MOST_FORCED]

    @property
    def has_forced(self) -> bool:
        """There are such tokens behind the one that a step in flight draws."""
        return self.constraint is not None and len(self.constraint.forced) > self.num_pending

    @property
    def awaits_grammar(self) -> bool:
        """It draws nothing before its grammar is compiled."""
        return self.constraint is None and self.sampling.grammar is not None

    @property
    def awaits_adapter(self) -> bool:
        """It computes nothing before its adapter is in a slot."""
        return self.adapter is not None and self.adapter_slot is None

    @property
    def broke_grammar(self) -> bool:
        """A token was drawn that its grammar does not allow: a peer's library is another, or a mask was lost."""
        return self.constraint is not None and self.constraint.is_broken

    def constrain(self, constraint: Constraint) -> None:
        """Its grammar is compiled; what was generated so far counts."""
        constraint.advance(self.token_ids[self.prompt_len :])
        self.constraint = constraint

    def append(self, token_id: int, logprob: Logprob | None) -> None:
        self.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.advance((token_id,))
        if logprob is not None:
            self.logprobs.append(logprob)

    def advance(self, length: int, num_accepted: int) -> None:
        """A step has computed `length` tokens and, behind them, drafts of which so many were accepted and appended."""
        self.num_computed += length + num_accepted
        self.num_launched += num_accepted

    def restart(self, num_computed: int) -> None:
        """KV up to `num_computed` is present, and no step runs ahead."""
        self.num_computed = self.num_launched = num_computed

    def unsent_tokens(self, finish: FinishReason, stages: Stages | None) -> Tokens:
        """The message with all tokens that were not sent yet, which count as sent from now on."""
        message = Tokens(
            request_id=self.leg.request_id,
            attempt=self.leg.attempt,
            index=self.num_sent,
            ids=tuple(self.token_ids[self.prompt_len + self.num_sent :]),
            logprobs=tuple(self.logprobs),
            finish=finish,
            accepted_prediction=self.num_predicted,
            cached_tokens=min(self.cached_tokens, self.prompt_len),
            stages=stages,
        )
        self.num_sent = len(self.token_ids) - self.prompt_len
        self.num_predicted = 0
        self.logprobs.clear()
        return message


def _num_scored(message: Prefill | Reserve) -> int:
    """Of the leg's prompt. The first token has no log probability; one that prefill computes needs none of decode."""
    body = message.body
    wanted = body.sampling.prompt_logprobs is not None and not (isinstance(message, Reserve) and message.prefill)
    return min(body.prompt_len, max(1, body.num_scored)) if wanted else body.prompt_len


def cancel_matches(cancel: Cancel, leg: LegKey) -> bool:
    """Whether `cancel` ends this leg: its request, and an attempt up to the one it names."""
    return leg.request_id == cancel.request_id and leg.attempt <= cancel.attempt


def failed(leg: LegKey, reason: str, *, retryable: bool) -> Failed:
    return Failed(request_id=leg.request_id, attempt=leg.attempt, reason=reason, retryable=retryable)


def transfer_failed(leg: LegKey, reason: str) -> Failed:
    """The KV of this leg did not come from prefill to decode."""
    reason = f"transfer: {reason}"
    return Failed(request_id=leg.request_id, attempt=leg.attempt, reason=reason, retryable=True, transfer=True)


def grammar_broken(leg: LegKey) -> Failed:
    return failed(leg, "a token was drawn that the grammar does not allow", retryable=True)


def busy(leg: LegKey, reason: str) -> Busy:
    return Busy(request_id=leg.request_id, attempt=leg.attempt, reason=reason)
