"""The queue before the workers of one model: requests wait here, in order, until the router finds a place.

Requests are admitted one after the other, so that a small one never starves a large one. The queue is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from baton.node.errors import DeadlineExceeded, Overloaded, PeerLost
from baton.proxy.routing.cluster import ClusterShape, ModelWorkers
from baton.proxy.routing.failed_pairs import FailedPairs
from baton.proxy.routing.kvindex import KvIndex
from baton.proxy.routing.router import RequestView, Route, RoutingRules, Wait, pick

NO_WORKER_GRACE_S = 5.0
"""Requests wait this long for a role whose last worker is gone, counted from its loss, before they fail."""
POLL_S = 0.1
"""Longest time between two looks at the cluster while a request waits."""


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
        self.waiting = 0
        self.rejected = 0
        """Requests that found the queue full."""
        self._index = index
        self._rules = rules
        self._failed_pairs = failed_pairs
        self._max_queue = max_queue
        self._clock = clock
        self._turn = asyncio.Lock()  # fair: first come, first served
        self._changed = asyncio.Event()
        self._stopping = False
        self._started_at = clock()

    async def admit(
        self, view_of: Callable[[ClusterShape], RequestView], deadline: float, *, first: bool
    ) -> tuple[Route, ClusterShape]:
        """Wait, in turn, until the router finds a place. Raises Overloaded, PeerLost, DeadlineExceeded.

        Only a first attempt may find the queue full: a stream that lost its worker has begun already.
        """
        if first and self.waiting >= self._max_queue:
            self.rejected += 1
            raise Overloaded(f"{self.waiting} requests are waiting already")
        self.waiting += 1
        try:
            async with asyncio.timeout_at(self._loop_time(deadline)), self._turn:
                return await self._find_route(view_of)
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before a worker had room for it") from None
        finally:
            self.waiting -= 1

    def cluster_changed(self) -> None:
        """There may be room now."""
        self._changed.set()

    def stop(self) -> None:
        """Requests that wait fail now."""
        self._stopping = True
        self._changed.set()

    def unready(self) -> str:
        """Why no request could be served now, or ""."""
        if self.workers.shape is None:
            return "no worker has registered"
        route = pick(self.workers.view(), RequestView(1 << 20, 0, 0), self._rules)
        return route.reason if isinstance(route, Wait) and route.missing else ""

    async def _find_route(self, view_of: Callable[[ClusterShape], RequestView]) -> tuple[Route, ClusterShape]:
        while True:
            self._changed.clear()
            shape = self.workers.last_shape
            if shape is None:
                raise PeerLost("no worker is there")
            request = view_of(shape)
            failed_pairs = self._failed_pairs.avoided(self._clock())
            seen = replace(request, hits=self._index.match(request.hashes), failed_pairs=failed_pairs)
            route = pick(self.workers.view(), seen, self._rules)
            if isinstance(route, Route):
                return route, shape
            if self._stopping:
                raise PeerLost("the proxy is shutting down")
            if route.missing and self._clock() - self._last_seen(route.missing) >= NO_WORKER_GRACE_S:
                raise PeerLost(route.reason)
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            except TimeoutError:
                continue

    def _last_seen(self, role: str) -> float:
        return max(self.workers.had_at(role), self._started_at)

    def _loop_time(self, deadline: float) -> float:
        """A deadline of our clock on the event loop's."""
        return asyncio.get_running_loop().time() + deadline - self._clock()
