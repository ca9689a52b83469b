"""The measurement of one generation, from its beginning to its record: what it counts, and when it is over.

Owns nothing but its counts; it writes to the metrics, the timeline and the request log.
"""

from __future__ import annotations

from baton.proxy.metrics.adapters import AdapterUsage
from baton.proxy.metrics.metrics import ModelMetrics
from baton.proxy.metrics.record import GenerationInfo, GenerationRecord
from baton.proxy.metrics.request_log import RequestLog
from baton.proxy.metrics.timeline import Timeline

CANCELLED = "cancelled"


class GenerationMeter:
    """Waiting until its first tokens, running until it is closed. Close it once."""

    def __init__(
        self,
        metrics: ModelMetrics,
        log: RequestLog,
        info: GenerationInfo,
        timeline: Timeline,
        usage: AdapterUsage | None = None,
    ) -> None:
        """usage: of its adapter."""
        self._metrics = metrics
        self._log = log
        self._info = info
        self._timeline = timeline
        self._first_at = 0.0
        self._num_tokens = 0
        self._cached_tokens = 0
        self._usage = usage or AdapterUsage()
        metrics.waiting.inc()
        self._usage.begun += 1
        self._usage.waiting += 1

    def tokens(self, num_tokens: int, cached_tokens: int) -> None:
        """New tokens have arrived; a cache had `cached_tokens` of the prompt."""
        metrics, line, now = self._metrics, self._timeline, self._metrics.clock()
        if self._num_tokens:
            metrics.itl.observe(now - line.last_tokens_at)
        else:
            self._first_at = now
            self._cached_tokens = cached_tokens
            metrics.begun(self._info.prompt_tokens, cached_tokens)
            self._usage.waiting -= 1
            self._usage.running += 1
        line.last_tokens_at = now
        self._num_tokens += num_tokens
        metrics.generation_tokens.inc(num_tokens)

    @property
    def num_tokens(self) -> int:
        """That have arrived."""
        return self._num_tokens

    def close(self, outcome: str) -> None:
        """The generation is over: "stop", "length", CANCELLED, or the kind of its failure."""
        line = self._timeline
        finished = outcome in ("stop", "length")
        line.end(finished=finished)
        (self._metrics.running if self._num_tokens else self._metrics.waiting).dec()
        if self._num_tokens:
            self._usage.running -= 1
        else:
            self._usage.waiting -= 1
        record = GenerationRecord(
            info=self._info,
            outcome=outcome,
            generated_tokens=self._num_tokens,
            cached_tokens=self._cached_tokens,
            segments=line.segments,
            attempts=tuple(line.attempts),
            num_attempts=line.num_attempts,
            loaded_tokens=line.loaded_tokens,
            prefix_hash=line.prefix_hash,
        )
        self._metrics.ended(record, first_at=self._first_at, last_at=line.last_tokens_at)
        self._log.add(record)
