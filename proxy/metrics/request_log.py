"""Where records of generations go when they are over: a log line, a ring for looking one up, an exporter of spans.

It owns the ring, which is bounded. Knows no HTTP.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
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
        self._keep = keep
        self._spans = spans or NoSpans()
        self._kept: OrderedDict[str, list[GenerationRecord]] = OrderedDict()  # by request id, the oldest first
        self._num_kept = 0

    def add(self, record: GenerationRecord) -> None:
        """A generation is over."""
        if record.total_s > self._slow_s:
            log_event(logger, "request_slow", level=logging.WARNING, **as_fields(record))
        elif logger.isEnabledFor(logging.DEBUG):
            log_event(logger, "request_finished", level=logging.DEBUG, **as_fields(record))
        self._spans.export(record)
        if self._keep:
            self._put(record)

    def find(self, request_id: str) -> list[GenerationRecord]:
        """The generations of a request, in the order in which they ended; empty if none is known (any more)."""
        return list(self._kept.get(request_id, ()))

    def close(self) -> None:
        """Hand over what the exporter still holds."""
        self._spans.close()

    def _put(self, record: GenerationRecord) -> None:
        self._kept.setdefault(record.info.request_id, []).append(record)
        self._num_kept += 1
        while self._num_kept > self._keep and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._num_kept -= len(oldest)
