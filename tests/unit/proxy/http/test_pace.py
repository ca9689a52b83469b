"""proxy.http.pace: a burst of requests begins a few at a time."""

from __future__ import annotations

import asyncio
from itertools import count, pairwise
from typing import Any

from starlette.types import Receive, Scope, Send

from baton.proxy.http.pace import REQUESTS_A_TURN, PacedRequests, arrived_s


class Recorder:
    """An app that notes which requests have reached it."""

    def __init__(self) -> None:
        self.begun: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.append(scope)


async def _nothing(*_: Any) -> Any: ...


def _scope(method: str, number: int) -> Scope:
    return {"type": "http", "method": method, "number": number}


async def test_probes_pass_a_burst_which_begins_in_order() -> None:
    """Guards /health, and the fairness of the wait; how long a request waited counts as part of its TTFT."""
    app, clock = Recorder(), count(1)
    paced = PacedRequests(app, lambda: next(clock))
    async with asyncio.TaskGroup() as burst:
        for number in range(20):
            burst.create_task(paced(_scope("POST", number), _nothing, _nothing))
        burst.create_task(paced(_scope("GET", 20), _nothing, _nothing))
        sizes = []
        while len(app.begun) < 21:
            await asyncio.sleep(0)
            sizes.append(len(app.begun))
    assert app.begun[0]["number"] == 20 and [scope["number"] for scope in app.begun[1:]] == list(range(20))
    assert max(later - earlier for earlier, later in pairwise(sizes)) <= REQUESTS_A_TURN
    assert [arrived_s(scope, lambda: 0.0) for scope in app.begun] == [0.0, *range(1, 21)]


async def test_other_scopes_pass() -> None:
    """Guards the server's start-up, which is no request."""
    app = Recorder()
    await PacedRequests(app, lambda: 1.0)({"type": "lifespan"}, _nothing, _nothing)
    assert app.begun == [{"type": "lifespan"}]
