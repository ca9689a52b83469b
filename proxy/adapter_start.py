"""Has workers load the adapters of --lora-modules before the first requests for them, and says which cannot be used.

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
POLL_S, LOAD_TIMEOUT_S = 0.2, 120.0


async def load_at_start(engine: Engine, adapters: Iterable[NamedAdapter]) -> None:
    """Returns when the adapters are loaded, once there are workers."""
    wanted = list(islice(adapters, MAX_LOADED))
    while wanted and engine.ready():
        await asyncio.sleep(POLL_S)
    for each in wanted:
        try:
            await engine.load_adapter(each.parent, each.adapter, timeout_s=LOAD_TIMEOUT_S)
        except BatonError as error:
            log_event(logger, "adapter_unusable", level=logging.WARNING, name=each.name, reason=str(error))
