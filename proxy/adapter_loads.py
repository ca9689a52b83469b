"""Asks workers to have an adapter in memory, and waits for their answers.

It knows which worker was asked for what, and nothing of names, models or HTTP.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from baton.node.messages.control import AdapterLoaded, AdapterRef, LoadAdapter


class AdapterLoads:
    """The loads that are awaited. Lives in one event loop."""

    def __init__(self, send: Callable[[str, LoadAdapter], bool]) -> None:
        self._send = send
        self._awaited: defaultdict[tuple[str, bytes], list[asyncio.Future[str]]] = defaultdict(list)

    async def load(self, workers: Sequence[str], adapter: AdapterRef, timeout_s: float) -> Mapping[str, str]:
        """The answers of those workers that gave one in time, and were not lost: why they cannot have it, or ""."""
        loop = asyncio.get_running_loop()
        futures = {}
        for worker in workers:
            futures[worker] = loop.create_future()
            self._awaited[worker, adapter.digest].append(futures[worker])
            self._send(worker, LoadAdapter(adapter=adapter))
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=timeout_s)
            answered = {
                worker: future for worker, future in futures.items() if future.done() and not future.cancelled()
            }
            return {worker: future.result() for worker, future in answered.items()}
        finally:
            for worker, future in futures.items():
                self._settle(worker, adapter.digest, future)

    def on_loaded(self, worker: str, message: AdapterLoaded) -> None:
        for future in self._awaited.get((worker, message.digest), ()):
            if not future.done():
                future.set_result(message.error)

    def on_lost(self, worker: str) -> None:
        for (each, _), futures in self._awaited.items():
            for future in futures if each == worker else ():
                future.cancel()

    def _settle(self, worker: str, digest: bytes, future: asyncio.Future[str]) -> None:
        waiting = self._awaited[worker, digest]
        waiting.remove(future)
        if not waiting:
            del self._awaited[worker, digest]
