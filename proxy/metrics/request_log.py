"""Where records of generations go when they are over: a log line, a ring for looking one up, an exporter of spans.

It owns the ring, which is bounded. Knows no HTTP.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Protocol

from baton.node.telemetry import log_event
from baton.proxy.metrics.record import GenerationRecord, as_fields

logger = logging.getLogger("proxy")


class Spans(Protocol):
    """Exports finished generations to a tracing system."""

    def export(self, record: GenerationRecord) -> None: ...

    def close(self) -> None: ...


class NoSpans:
    """No tracing system."""

    def export(self, record: GenerationRecord) -> None: ...

    def close(self) -> None: ...


class RequestLog:
    """`slow_s`: a generation that took longer is logged as a warning. `keep`: number of records to keep."""

    def __init__(self, *, slow_s: float = math.inf, keep: int = 0, spans: Spans | None = None) -> None:
        self._slow_s = slow_s
        self._spans = spans or NoSpans()
        self._kept: deque[GenerationRecord] = deque(maxlen=keep)

    def add(self, record: GenerationRecord) -> None:
        """A generation is over."""
        if record.total_s > self._slow_s:
            log_event(logger, "request_slow", level=logging.WARNING, **as_fields(record))
        elif logger.isEnabledFor(logging.DEBUG):
            log_event(logger, "request_finished", level=logging.DEBUG, **as_fields(record))
        self._spans.export(record)
        self._kept.append(record)

    def find(self, request_id: str) -> list[GenerationRecord]:
        """The generations of a request, in the order in which they ended; empty if none is known (any more)."""
        return [record for record in self._kept if record.info.request_id == request_id]

    def close(self) -> None:
        """Hand over what the exporter still holds."""
        self._spans.close()
