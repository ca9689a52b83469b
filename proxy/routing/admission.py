"""The queue before the workers of one model: requests wait here until it is their turn and the router finds a place.

Whose turn it is, is the queue's to say. The request whose turn it is waits until there is room for it, so that a small
one never starves a large one; only requests of a tenant that holds its share of the workers are passed over. The queue
is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from baton.node.errors import DeadlineExceeded, Overloaded, PeerLost
from baton.proxy.routing.failed_pairs import FailedPairs, Pair
from baton.proxy.routing.fair_queue import FairQueue, Ticket
from baton.proxy.routing.kvindex import KvIndex
from baton.proxy.routing.model_workers import ClusterShape, ModelWorkers
from baton.proxy.routing.revisions import RevisionOffer, in_order
from baton.proxy.routing.roles import pick_mixed
from baton.proxy.routing.router import RequestView, Route, RoutingRules, Wait, WorkerView

NO_WORKER_GRACE_S = 5.0
"""Requests wait this long for a role whose last worker is gone, counted from its loss, before they fail."""
POLL_S = 0.1
"""Longest time between two looks at the cluster while a request waits."""

ViewOf = Callable[[ClusterShape], RequestView | None]
"""None where a revision of this shape cannot go on with the request."""


@dataclass(slots=True)
class _Waiter:
    """One request in the queue."""

    ticket: Ticket
    view_of: ViewOf
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    refused: bool = False
    """Another one has its place in the queue."""


class Admission:
    """Admits requests to one model. Lives in one event loop."""

    def __init__(
        self,
        workers: ModelWorkers,
        index: KvIndex,
        rules: RoutingRules,
        failed_pairs: FailedPairs,
        max_queue: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = workers
        self.rejected = 0
        """Requests that found the queue full, or made room in it."""
        self._routes: Counter[str] = Counter()  # by revision
        self._index = index
        self._rules = rules
        self._failed_pairs = failed_pairs
        self._max_queue = max_queue
        self._clock = clock
        self._queue = FairQueue()
        self._waiters: dict[int, _Waiter] = {}
        """By their numbers in the queue."""
        self._stopping = False
        self._started_at = clock()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def dispatched(self) -> dict[str, int]:
        """Routes that were found, by revision: of those that have workers, and the last ones that had."""
        found = {name: self._routes[name] for name in self.workers.revision_names}
        self._routes = Counter(found)
        return found

    async def admit(self, ticket: Ticket, view_of: ViewOf, deadline: float) -> tuple[Route, ClusterShape]:
        """Wait, in turn, until the router finds a place. Raises Overloaded, PeerLost, DeadlineExceeded."""
        if ticket.refusable and self.waiting >= self._max_queue:
            self._make_room(ticket.tenant)
        number = self._queue.add(ticket)
        waiter = self._waiters[number] = _Waiter(ticket, view_of)
        waiting = self._queue.waiting(ticket.tenant)
        self.workers.shares.ask(ticket.tenant, waiting, waiting * self._num_blocks(ticket), self._clock())
        try:
            async with asyncio.timeout_at(self._loop_time(deadline)):
                found = await self._find_route(number, waiter)
            self._queue.admit(number)
            return found
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before a worker had room for it") from None
        finally:
            del self._waiters[number]
            self._queue.discard(number)
            self._wake()

    def ended(self, tenant: str, tokens: int) -> None:
        """A request of the tenant has ended that counted for so many tokens too few, or too many (negative)."""
        self._queue.correct(tenant, tokens)
        self.workers.shares.see(tenant, self._clock())

    def cluster_changed(self) -> None:
        """There may be room now."""
        self._wake()

    def stop(self) -> None:
        """Requests that wait fail now."""
        self._stopping = True
        self._wake()

    def unready(self) -> str:
        """Why no request could be served now, or ""."""
        if self.workers.shape is None:
            return "no worker has registered"
        probe = RequestView(1 << 20, 0, 0)
        routes = [self._pick(revision.workers, probe) for revision in self.workers.revisions()]
        missing = [route.reason for route in routes if isinstance(route, Wait) and route.missing]
        return missing[0] if len(missing) == len(routes) else ""

    def _make_room(self, tenant: str) -> None:
        """Turn the last one away of the tenant that has most in the queue; raises Overloaded where it is this one."""
        self.rejected += 1
        number = self._queue.to_refuse(tenant)
        if number is None:
            raise Overloaded(f"{self.waiting} requests are waiting already")
        self._queue.discard(number)
        self._waiters[number].refused = True
        self._waiters[number].woken.set()

    async def _find_route(self, number: int, waiter: _Waiter) -> tuple[Route, ClusterShape]:
        """Wait for the turn and a place. The first in the queue looks now and then, as much depends on the time."""
        while True:
            waiter.woken.clear()
            if waiter.refused:
                raise Overloaded("the queue is full, and requests of this key have most places in it")
            if self._stopping:
                raise PeerLost("the proxy is shutting down")
            turn = self._turn()
            if turn == number:
                found = self._try(waiter)
                if found is not None:
                    return found
            elif turn is not None:
                self._waiters[turn].woken.set()
            # Not asyncio.wait_for, which before Python 3.12 drops a cancellation that comes with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if number == self._queue.first() else None):
                    await waiter.woken.wait()

    def _try(self, waiter: _Waiter) -> tuple[Route, ClusterShape] | None:
        """The route, if there is one now. Raises PeerLost where none is to be expected."""
        now = self._clock()
        failed_pairs = self._failed_pairs.avoided(now) | self.workers.cut_pairs()
        reason = "no worker is there"
        may_come = False
        for offer in in_order(self._offers(waiter.view_of, failed_pairs)):
            route = self._pick(offer.revision.workers, offer.request)
            if isinstance(route, Route):
                self.workers.mixed.prompt(offer.request.num_tokens - route.hit_tokens, now)
                self._routes[offer.revision.name] += 1
                contended = self.workers.shares.contended(waiter.ticket.tenant, now)
                return (replace(route, contended=True) if contended else route), offer.revision.shape
            may_come = may_come or not self._is_vain(offer.revision.name, route, now)
            reason = route.reason
        if not may_come:
            raise PeerLost(reason)
        return None

    def _offers(self, view_of: ViewOf, failed_pairs: frozenset[Pair]) -> list[RevisionOffer]:
        offers = []
        for revision in self.workers.revisions():
            if (request := view_of(revision.shape)) is not None:
                hits = self._index.match(request.hashes)
                offers.append(RevisionOffer(revision, replace(request, hits=hits, failed_pairs=failed_pairs)))
        return offers

    def _is_vain(self, revision: str, wait: Wait, now: float) -> bool:
        """Whether a request had better not wait for this."""
        if wait.in_vain or not wait.missing:
            return wait.in_vain
        last_seen = max(self.workers.had_at(revision, wait.missing), self._started_at)
        return now - last_seen >= NO_WORKER_GRACE_S

    def _pick(self, workers: Sequence[WorkerView], request: RequestView) -> Route | Wait:
        return pick_mixed(workers, request, self._rules, self.workers.mixed)

    def _turn(self) -> int | None:
        """Whose turn it is: the first one's whose tenant does not hold its share of the workers."""
        view, now, shares = self.workers.view(), self._clock(), self.workers.shares
        for number in self._queue.heads():
            ticket = self._waiters[number].ticket
            if shares.allow(ticket.tenant, ticket.num_tokens, self._num_blocks(ticket), view, now):
                return number
        return None

    def _wake(self) -> None:
        for number in {self._queue.first(), self._turn()} if self._waiters else ():
            if number is not None:
                self._waiters[number].woken.set()

    def _num_blocks(self, ticket: Ticket) -> int:
        block_tokens = self.workers.block_tokens
        return -(-ticket.num_tokens // block_tokens) if block_tokens else 0

    def _loop_time(self, deadline: float) -> float:
        """A deadline of our clock on the event loop's."""
        return asyncio.get_running_loop().time() + deadline - self._clock()
