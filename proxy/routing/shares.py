"""How much of the workers one tenant may hold while others have requests too. Knows no clock and no worker's load.

A worker serves what it has in order of arrival, so what one tenant has there delays all others. While others are
active, a tenant may have prompts there for a short time of computing. Of the rows and blocks of decode workers it
leaves free what the others have lately wanted at once and half of it, up to an even part. One that has its even part
leaves a few free in any case, for those that have less. One prompt a worker, and one row, each may always have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.proxy.routing.router import WorkerView

ACTIVE_S = 60.0
"""A tenant is active for so long after its last request began or ended."""
QUEUED_S = 0.03
"""Of a tenant's prompts that wait at workers or are being computed, at the workers' speed: a full step of a GPU, and a
part of the next."""
FREE_PART = 1 / 9
"""Of rows and blocks, that are not for tenants which have their even part."""
NO_TENANT = ""
"""A probe of the proxy's own."""


@dataclass(slots=True)
class _Peak:
    """The most rows and blocks of the last ACTIVE_S to twice as long."""

    rows: int = 0
    blocks: int = 0
    old_rows: int = 0
    old_blocks: int = 0
    since: float = float("-inf")

    def add(self, rows: int, blocks: int, now: float) -> None:
        if now - self.since > ACTIVE_S:
            self.old_rows, self.old_blocks, self.rows, self.blocks, self.since = self.rows, self.blocks, 0, 0, now
        self.rows, self.blocks = max(self.rows, rows), max(self.blocks, blocks)

    def rows_below(self, part: int, held: int) -> int:
        """What is missing of half as much again as the peak, or of `part`, where so many are held."""
        return max(0, min(part, max(self.rows, self.old_rows) * 3 // 2) - held)

    def blocks_below(self, part: int, held: int) -> int:
        return max(0, min(part, max(self.blocks, self.old_blocks) * 3 // 2) - held)


@dataclass(slots=True)
class Held:
    """What a tenant has at the workers of a model."""

    rows: int = 0
    """Of decode workers."""
    blocks: int = 0
    """Of decode workers, for the tokens that were known at admission."""
    prompts: int = 0
    """That are not computed."""
    tokens: int = 0
    """Of these."""
    seen_at: float = float("-inf")
    """When it last asked for a place, or left one."""
    wanted: _Peak = field(default_factory=_Peak)
    """Rows and blocks at once, lately."""


class Shares:
    """What each tenant holds at the workers of one model."""

    def __init__(self) -> None:
        self._held: defaultdict[str, Held] = defaultdict(Held)

    def take(self, tenant: str, role: str, tokens: int, blocks: int) -> None:
        """A leg at a worker of the role, with so many tokens to compute, perhaps 0."""
        held = self._held[tenant]
        held.prompts += tokens > 0
        held.tokens += tokens
        if role != "prefill":
            held.rows += 1
            held.blocks += blocks

    def computed(self, tenant: str, tokens: int) -> None:
        """These tokens of a leg are computed, or given up."""
        held = self._held[tenant]
        held.prompts -= tokens > 0
        held.tokens -= tokens

    def leave(self, tenant: str, role: str, blocks: int) -> None:
        """A leg has ended, its tokens before it."""
        if role != "prefill":
            held = self._held[tenant]
            held.rows -= 1
            held.blocks -= blocks

    def see(self, tenant: str, now: float) -> None:
        """It is active now."""
        self._held[tenant].seen_at = now

    def ask(self, tenant: str, num_requests: int, num_blocks: int, now: float) -> None:
        """It has so many requests in the queue, of about so many blocks together."""
        held = self._held[tenant]
        held.seen_at = now
        held.wanted.add(held.rows + num_requests, held.blocks + num_blocks, now)

    def allow(self, tenant: str, num_tokens: int, num_blocks: int, workers: Sequence[WorkerView], now: float) -> bool:
        """Whether the tenant may have one more request at the workers, of so many tokens and blocks."""
        others = self._others(tenant, now)
        if not others:
            return True
        held = self._held[tenant]
        return _prompt_fits(held, num_tokens, workers) and _row_fits(held, num_blocks, others, workers)

    def contended(self, tenant: str, now: float) -> bool:
        """Whether others than this tenant are active."""
        return bool(self._others(tenant, now))

    def _others(self, tenant: str, now: float) -> list[Held]:
        return [held for name, held in self._held.items() if name not in (tenant, NO_TENANT) and _is_active(held, now)]


def _is_active(held: Held, now: float) -> bool:
    return held.rows > 0 or held.prompts > 0 or now - held.seen_at < ACTIVE_S


def _prompt_fits(held: Held, num_tokens: int, workers: Sequence[WorkerView]) -> bool:
    computing = [worker for worker in workers if worker.role == "prefill"] or workers
    if held.prompts < len(computing):
        return True
    return held.tokens + num_tokens <= QUEUED_S * sum(worker.tokens_s for worker in computing)


def _row_fits(held: Held, num_blocks: int, others: Sequence[Held], workers: Sequence[WorkerView]) -> bool:
    """Whether what stays free suffices for what each of the others has not of its peak, or of its even part; and for
    the free part, where this tenant would have more than its own even part."""
    if not held.rows:
        return True
    decodes = [worker for worker in workers if worker.role != "prefill"]
    rows = sum(worker.max_num_seqs for worker in decodes)
    blocks = sum(worker.total_blocks for worker in decodes)
    free_rows = sum(max(0, worker.max_num_seqs - worker.requests) for worker in decodes) - 1
    free_blocks = sum(worker.free_blocks for worker in decodes) - num_blocks
    parts = 1 + len(others)
    kept_rows = sum(each.wanted.rows_below(rows // parts, each.rows) for each in others)
    kept_blocks = sum(each.wanted.blocks_below(blocks // parts, each.blocks) for each in others)
    if held.rows >= rows // parts or held.blocks + num_blocks > blocks // parts:
        kept_rows, kept_blocks = max(kept_rows, int(FREE_PART * rows)), max(kept_blocks, int(FREE_PART * blocks))
    return free_rows >= kept_rows and free_blocks >= kept_blocks
