"""How large a tier must be: the share of prompt tokens that one shared LRU of a given size finds, over a trace. Pure.

This is an upper bound for any placement with LRU eviction: no worker's pool is full, no block is on the wrong host, and
a block is available as soon as its prompt has arrived.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from baton.simulator.workload import TRACE_BLOCK_TOKENS, SimRequest


@dataclass(frozen=True, slots=True)
class Hits:
    """Prompt tokens of a workload, and those of them that were in the cache."""

    tokens: int
    hit_tokens: int

    @property
    def share(self) -> float:
        """The hit rate, 0 to 1."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def hit_rate(requests: Sequence[SimRequest], capacity_tokens: float) -> Hits:
    """`capacity_tokens` may be infinite. A prompt hits its longest prefix; then all of its blocks are the newest.

    Blocks are those of the trace; a last partial block counts with its own tokens.
    """
    capacity_blocks = capacity_tokens / TRACE_BLOCK_TOKENS
    held: OrderedDict[int, None] = OrderedDict()  # oldest first
    tokens = hit_tokens = 0
    for request in requests:
        tokens += request.prompt_tokens
        found = 0
        while found < len(request.prefix) and request.prefix[found] in held:
            found += 1
        hit_tokens += min(found * TRACE_BLOCK_TOKENS, request.prompt_tokens)
        for name in reversed(request.prefix):  # tails are evicted first
            held[name] = None
            held.move_to_end(name)
        while len(held) > capacity_blocks:
            held.popitem(last=False)
    return Hits(tokens, hit_tokens)
