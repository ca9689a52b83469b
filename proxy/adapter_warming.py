"""Has workers that join load the adapters with names, before the first requests, and says which cannot be used.

Requests need none of it: an adapter that is not there yet is loaded for the first of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from itertools import islice

from baton.node.errors import BatonError
from baton.node.telemetry import log_event
from baton.proxy.adapter_names import NamedAdapter
from baton.proxy.interface import Engine

logger = logging.getLogger("proxy")

MAX_LOADED = 64
"""More are loaded when they are asked for: memory may not have room for all."""
POLL_S, LOAD_TIMEOUT_S = 0.5, 120.0


async def warm_workers(engine: Engine, adapters: Iterable[NamedAdapter], poll_s: float = POLL_S) -> None:
    """Goes on until it is cancelled. A worker that has an adapter already answers at once."""
    warm: set[str] = set()
    while True:
        workers = {each.worker for each in engine.worker_loads() if each.max_loras}
        cold, warm = workers - warm, workers
        for each in list(islice(adapters, MAX_LOADED if cold else 0)):
            try:
                await engine.load_adapter(each.parent, each.adapter, timeout_s=LOAD_TIMEOUT_S)
            except BatonError as error:
                log_event(logger, "adapter_unusable", level=logging.WARNING, name=each.name, reason=str(error))
        await asyncio.sleep(poll_s)
