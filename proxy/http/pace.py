"""Requests that arrive together begin a few at a time: a burst does not hold the event loop until all have begun.

ASGI middleware around all others. Only POST waits: probes and scrapes go before.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from baton.proxy.inbox import Turns

REQUESTS_A_TURN = 4
"""Each takes the event loop some 0.5 ms until it is with its workers."""
_ARRIVED_S = "baton.arrived_s"


class PacedRequests:
    """Notes when each request arrived, by `clock`, before it waits for its turn."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float]) -> None:
        self._app = app
        self._clock = clock
        self._turns = Turns(REQUESTS_A_TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            scope[_ARRIVED_S] = self._clock()
            await self._turns.next()
        await self._app(scope, receive, send)


def arrived_s(scope: Scope, clock: Callable[[], float]) -> float:
    """When the request arrived, by `clock`: now, where nothing has made it wait."""
    return float(scope.get(_ARRIVED_S) or clock())
