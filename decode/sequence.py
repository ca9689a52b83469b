"""One sequence in a decode worker, from its reservation to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.kvtransfer.blocks.table import BlockTable
from baton.node.leg import LegKey
from baton.node.messages.base import FinishReason
from baton.node.messages.control import Logprob, SamplingParams, Stages, Tokens
from baton.worker.stages import LegTimes


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed` of its `num_tokens` known tokens have their KV here. A step, the prefix cache and a transfer move
    it forward; preemption sets it back to nothing. Steps that were launched and not read yet run ahead of both counts:
    they compute up to `num_launched`, and draw `num_pending` tokens that nobody knows yet."""

    leg: LegKey
    link: str
    """The proxy that asked, by the name of the link to it."""
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    priority: int
    deadline: float
    table: BlockTable
    times: LegTimes
    transfer_id: bytes = b""
    """The transfer that it waits for; empty once there is none."""
    first_missing_block: int = 0
    """Blocks from here on are written by the transfer."""
    num_computed: int = 0
    num_launched: int = 0
    num_pending: int = 0
    slot: int = 0
    """Its place in the runner's memory, while it runs."""
    stay: int = 0
    """How often it was preempted: what a step computed before has gone with its blocks."""
    cached_tokens: int = 0
    asked: bool = False
    """The store was asked for its prefix, if there is one, since it last had blocks."""
    stored_blocks: int = 0
    """So many of its first blocks need not be offered to the store (any more)."""
    told: int = 0
    """Generated tokens that the proxy was told of, counted from the end of the prompt."""
    logprobs: list[Logprob] = field(default_factory=list)
    """Of the tokens not told yet."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_expected(self) -> int:
        """Known tokens, and those drawn already that nobody has read."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def append(self, token_id: int, logprob: Logprob | None) -> None:
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)

    def tell(self, finish: FinishReason, stages: Stages | None) -> Tokens:
        """The message with all tokens that were not told yet."""
        message = Tokens(
            request_id=self.leg.request_id,
            attempt=self.leg.attempt,
            index=self.told,
            ids=tuple(self.token_ids[self.prompt_len + self.told :]),
            logprobs=tuple(self.logprobs),
            finish=finish,
            cached_tokens=min(self.cached_tokens, self.prompt_len),
            stages=stages,
        )
        self.told = self.num_generated
        self.logprobs.clear()
        return message
