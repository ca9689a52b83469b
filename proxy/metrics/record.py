"""What is kept of a generation when it is over: lengths, hashes, outcome and timeline. Never text, never token ids.

Knows how a record looks as JSON and as the fields of a log line, and nothing of where it goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from baton.node.messages.control import SamplingSpec
from baton.node.messages.store import TIER_NAMES
from baton.proxy.metrics.timeline import Attempt, Segment

SHOWN_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class GenerationInfo:
    """What is known of a generation before it begins."""

    request_id: str
    """The HTTP request's, as its client knows it."""
    index: int
    """Which of the request's answers."""
    operation: str
    """"chat" | "text_completion", as OpenTelemetry names them."""
    model: str
    stream: bool
    prompt_tokens: int
    sampling: SamplingSpec | None
    """None for a request that was refused before it had any."""
    began_unix_ns: int
    """The wall clock at the request's first byte: only to say when it was."""
    trace_headers: Mapping[str, str]
    """`traceparent` and `tracestate`, where the client sent them."""


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """One generation that is over."""

    info: GenerationInfo
    outcome: str
    """"stop" | "length" | "cancelled" | one of FAILURE_KINDS."""
    generated_tokens: int
    cached_tokens: int
    segments: tuple[Segment, ...]
    attempts: tuple[Attempt, ...]
    """The last ones; the last of all is the one that ended it."""
    num_attempts: int
    loaded_tokens: tuple[int, ...]
    """Of the cached ones, those from each tier below the pool (TIER_NAMES); empty where there were none."""
    prefix_hash: bytes
    """Of the prompt's first block, chained to the model's; empty for a prompt that fills no block."""

    @property
    def total_s(self) -> float:
        return sum(segment.total_s for segment in self.segments)

    def tokens_by_source(self) -> dict[str, int]:
        """The prompt's tokens by where their KV came from: a worker's pool, a tier below it, or a step."""
        loaded = dict(zip(TIER_NAMES, self.loaded_tokens, strict=False))
        in_pool = max(0, self.cached_tokens - sum(loaded.values()))
        return {"gpu": in_pool, **loaded, "computed": self.info.prompt_tokens - self.cached_tokens}

    def segment(self, until: str) -> Segment | None:
        """The segment of this name, if the generation came to its end."""
        return next((segment for segment in self.segments if segment.until == until and segment.complete), None)


def as_fields(record: GenerationRecord) -> dict[str, str | int | float]:
    """For one log line; the stages of a segment stand under its name."""
    info, last = record.info, record.attempts[-1] if record.attempts else Attempt("", "")
    fields: dict[str, str | int | float] = {
        "request_id": info.request_id,
        "index": info.index,
        "outcome": record.outcome,
        "prompt_tokens": info.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "generated_tokens": record.generated_tokens,
        "prefix": _shown(record.prefix_hash),
        "attempts": record.num_attempts,
        "prefill": last.prefill,
        "decode": last.decode,
        "total_s": record.total_s,
    }
    for segment in record.segments:
        fields[f"{segment.until}_s"] = segment.total_s
        fields |= {f"{segment.until}.{stage}_s": took_s for stage, took_s in segment.stages}
    return fields


def as_json(record: GenerationRecord) -> dict[str, object]:
    """For `GET /debug/requests/{id}`."""
    info = record.info
    return {
        "index": info.index,
        "operation": info.operation,
        "model": info.model,
        "stream": info.stream,
        "outcome": record.outcome,
        "began_unix_s": info.began_unix_ns / 1e9,
        "prompt_tokens": info.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "generated_tokens": record.generated_tokens,
        "tokens_by_source": record.tokens_by_source(),
        "prefix_hash": _shown(record.prefix_hash),
        "total_s": record.total_s,
        "num_attempts": record.num_attempts,
        "attempts": [dataclasses.asdict(attempt) for attempt in record.attempts],
        "timeline": [
            {
                "until": segment.until,
                "complete": segment.complete,
                "total_s": segment.total_s,
                "stages": dict(segment.stages),
            }
            for segment in record.segments
        ],
    }


def _shown(prefix_hash: bytes) -> str:
    """Enough of a hash to see that two prompts begin alike."""
    return prefix_hash[:SHOWN_HASH_BYTES].hex()
