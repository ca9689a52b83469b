"""The proxies of one machine that share an HTTP port, as one of them sees the others.

A connection to the port reaches any of them, so what only one knows (its metrics, a request that it has served, that
names of adapters have changed) is asked of all, each at a Unix socket of its own. They share nothing else but that file
of names: each knows workers, load and blocks by itself.
A proxy that does not answer in time is left out.
"""

from __future__ import annotations

import asyncio
from itertools import chain
from pathlib import Path
from typing import Protocol

from baton.node import local_http
from baton.node.local_http import proxy_socket
from baton.proxy.metrics.merge import merge
from baton.proxy.metrics.metrics import ProxyMetrics
from baton.proxy.metrics.pieces import join_in_pieces

ASK_TIMEOUT_S = 1.0
OWN_METRICS = "/metrics/own"
REPORTED_METRICS = "/metrics/reported"
READ_ADAPTERS = "/adapters/read"
UP = "baton:proxy_up"
_UP_HEAD = f"# HELP {UP} Whether a proxy that shares the port has answered.\n# TYPE {UP} gauge\n"


class Group(Protocol):
    """What the HTTP side needs of the other proxies."""

    async def metrics(self, metrics: ProxyMetrics) -> bytes:
        """The page of all proxies; `metrics` are this one's."""
        ...

    async def find(self, path: str) -> bytes:
        """The body of the first other proxy that has something at `path`; empty where none has."""
        ...

    async def visit(self, path: str) -> None:
        """Have each other proxy do what it does at `path`, those that answer in time before this returns."""
        ...


class Alone:
    """There is one proxy."""

    async def metrics(self, metrics: ProxyMetrics) -> bytes:
        return await join_in_pieces(chain(metrics.own(), metrics.reported()))

    async def find(self, path: str) -> bytes:
        return b""

    async def visit(self, path: str) -> None:
        return


class SharedPort:
    """Number `index` of `count` proxies whose sockets are in `folder`."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self._folder = folder
        self._index = index
        self._others = [other for other in range(count) if other != index]

    async def metrics(self, metrics: ProxyMetrics) -> bytes:
        """What each proxy counts, by proxy, and what workers report, as the first proxy that answers has it: sums over
        workers that went away differ between proxies, and must not fall from one scrape to the next."""
        answers = await self._ask_others(OWN_METRICS)
        pages = {self._index: await join_in_pieces(metrics.own())} | {
            other: body for other, body in answers.items() if body
        }
        first = min(pages)
        reported = b"" if first == self._index else await self._ask(first, REPORTED_METRICS)
        members = sorted([self._index, *self._others])
        up = "".join(f'{UP}{{proxy="{member}"}} {float(member in pages)}\n' for member in members)
        merged = merge({str(each): pages[each].decode() for each in sorted(pages)})
        texts = (text.encode() for text in chain(merged, (_UP_HEAD, up)))
        return await join_in_pieces(chain(texts, (reported,) if reported else metrics.reported()))

    async def find(self, path: str) -> bytes:
        return next((body for body in (await self._ask_others(path)).values() if body), b"")

    async def visit(self, path: str) -> None:
        await self._ask_others(path)

    async def _ask_others(self, path: str) -> dict[int, bytes]:
        bodies = await asyncio.gather(*(self._ask(other, path) for other in self._others))
        return dict(zip(self._others, bodies, strict=True))

    async def _ask(self, other: int, path: str) -> bytes:
        """The answer, empty unless it is a 200."""
        status, body = await local_http.get(proxy_socket(self._folder, other), path, ASK_TIMEOUT_S)
        return body if status == 200 else b""
