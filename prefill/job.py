"""One prompt on its way through a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass

from baton.kvtransfer.blocks.table import BlockTable
from baton.node.leg import LegKey
from baton.node.messages.control import SamplingParams
from baton.worker.stages import LegTimes


@dataclass(slots=True, eq=False)
class Job:
    """`num_computed` of the `len(token_ids)` tokens have their KV in the pool; the difference is the work left. Steps
    that were launched and not read yet compute up to `num_launched`."""

    leg: LegKey
    link: str
    """The proxy that asked, by the name of the link to it."""
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    priority: int
    deadline: float
    table: BlockTable
    times: LegTimes
    num_computed: int = 0
    num_launched: int = 0
    cached_tokens: int = 0
    foreseen: int = 0
    """Tokens that the pool had when it came: until it starts it is not known better what is left to compute."""
    started: bool = False
    """It holds blocks for all its tokens."""
    asked: bool = False
    """The store was asked for its prefix, if there is one."""
    stored_blocks: int = 0
    """So many of its first blocks need not be offered to the store (any more)."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def coming(self) -> tuple[bytes, ...]:
        """The names of the blocks that it has yet to compute."""
        return self.table.names(self.num_tokens)[self.num_computed // self.table.block_tokens :]
