"""The order in which requests of several tenants are served. Pure: no clock, no worker.

The tenant that was served the fewest tokens is next, and of its requests the one of the highest priority, then the
oldest. A tenant that comes back after it had nothing to ask for starts little before the least served of the others:
being idle saves no more up than a short burst. Source: the virtual token counter of Sheng et al., "Fairness in Serving
Large Language Models" (OSDI 2024), which has no burst. Here a request counts as what it may come to when it is
admitted, and as it was when it has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

BURST_TOKENS = 16384
"""A tenant that uses less than its part is served so much in a row, if it asks for it: some requests that come
together. The others wait for it once, for 0.4 s of a GPU."""
MOST_STALE = 64
"""Entries of a heap whose requests have left, beyond those that wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request in the queue."""

    tenant: str = ""
    priority: int = 0
    """Higher is served first, within its tenant."""
    turn: int = 0
    """Counts requests: of equal priority, lower ones are older. A further attempt keeps that of the first."""
    num_tokens: int = 0
    """That are known: to be computed, or in a cache."""
    cost_tokens: int = 0
    """What its admission counts as."""
    refusable: bool = False
    """It has not begun, so that it may be turned away."""


@dataclass(slots=True)
class _Tenant:
    served: float = 0.0
    """Tokens, counted from where it began."""
    admitted: int = 0
    """Number of the last admission, which tells tenants of equal service apart."""
    waiting: dict[int, Ticket] = field(default_factory=dict)
    """By the number that they had in the queue."""
    order: list[tuple[int, int, int]] = field(default_factory=list)
    """A heap of (priority negated, turn, number); those that left may still be in it."""

    def leave(self, number: int) -> None:
        del self.waiting[number]
        if len(self.order) > MOST_STALE + 2 * len(self.waiting):
            self.order = [entry for entry in self.order if entry[2] in self.waiting]
            heapq.heapify(self.order)

    def first(self) -> int | None:
        while self.order and self.order[0][2] not in self.waiting:
            heapq.heappop(self.order)
        return self.order[0][2] if self.order else None


class FairQueue:
    """Tickets by the numbers that `add` gives them."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._tenant_of: dict[int, str] = {}
        self._added = 0
        self._admitted = 0
        self._floor = 0.0
        """What the last admitted tenant had been served when it was admitted."""

    def __len__(self) -> int:
        return len(self._tenant_of)

    def waiting(self, tenant: str) -> int:
        """Of this tenant."""
        return len(found.waiting) if (found := self._tenants.get(tenant)) is not None else 0

    def add(self, ticket: Ticket) -> int:
        tenant = self._tenants.setdefault(ticket.tenant, _Tenant())
        if not tenant.waiting:
            tenant.served = max(tenant.served, self._least_served() - BURST_TOKENS)
        self._added += 1
        tenant.waiting[self._added] = ticket
        heapq.heappush(tenant.order, (-ticket.priority, ticket.turn, self._added))
        self._tenant_of[self._added] = ticket.tenant
        return self._added

    def discard(self, number: int) -> None:
        """It does not wait any more, if it did."""
        if (tenant := self._tenant_of.pop(number, None)) is not None:
            self._tenants[tenant].leave(number)

    def admit(self, number: int) -> None:
        """It is served now."""
        tenant = self._tenants[self._tenant_of[number]]
        self._admitted += 1
        tenant.admitted = self._admitted
        self._floor = tenant.served
        tenant.served += tenant.waiting[number].cost_tokens
        self.discard(number)

    def correct(self, tenant: str, tokens: int) -> None:
        """A request of the tenant has ended that counted for so many tokens too few, or too many (negative)."""
        if (found := self._tenants.get(tenant)) is not None:
            found.served += tokens

    def heads(self) -> Iterator[int]:
        """The first of each tenant's tickets, in the order in which they are to be served."""
        waiting = sorted((each.served, each.admitted, name) for name, each in self._tenants.items() if each.waiting)
        for _, _, name in waiting:
            if (number := self._tenants[name].first()) is not None:
                yield number

    def first(self) -> int | None:
        """The next one, whatever its tenant holds elsewhere."""
        return next(self.heads(), None)

    def to_refuse(self, tenant: str) -> int | None:
        """Which one is turned away for a new one of `tenant` where the queue is full: the last of the tenant with the
        most, if it has more than `tenant` would have; None: the new one."""
        longest = max(self._tenants.values(), key=lambda each: len(each.waiting))
        own = self._tenants.get(tenant)
        if len(longest.waiting) <= (len(own.waiting) if own is not None else 0) + 1:
            return None
        refusable = [(-each.priority, each.turn, number) for number, each in longest.waiting.items() if each.refusable]
        return max(refusable)[2] if refusable else None

    def _least_served(self) -> float:
        return min((each.served for each in self._tenants.values() if each.waiting), default=self._floor)
