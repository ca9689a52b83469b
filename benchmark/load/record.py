"""The record of each request, which every figure is computed from, and its JSON line.

Times are seconds from the start of the run. Lengths only: no text of a prompt or an answer is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request.

    `due_s` is where its latencies begin: its scheduled time, or, without a schedule, when the client could send it.
    """

    index: int
    conversation: int
    turn: int
    status: str
    """completed, failed, or cancelled (by this client, on purpose)."""
    error: str
    due_s: float
    begun_s: float
    """When the client began to handle it; a delay up to here is the client's."""
    sent_s: float
    """When it was written, after it had waited for one of `--max-concurrency` slots."""
    first_s: float | None
    """When its first token was read; None if there was none."""
    last_s: float
    """When its last token was read; where there was none, when it ended."""
    gaps_s: tuple[float, ...]
    """Between the chunks of its answer."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    counted: bool
    """Output tokens are the server's count; else chunks with text."""

    @property
    def completed(self) -> bool:
        return self.status == COMPLETED

    @property
    def lag_s(self) -> float:
        """How late the client was."""
        return max(0.0, self.begun_s - self.due_s)

    @property
    def queue_s(self) -> float:
        """How long it waited in the client for a slot, after it was due."""
        return max(0.0, self.sent_s - max(self.begun_s, self.due_s))

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def e2el_s(self) -> float:
        return self.last_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """None where there is no token after the first."""
        if self.first_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)


def json_lines(records: Iterable[Record], server: str, rate: str, seed: int) -> bytes:
    """A line a request, each with what run it is of in front, and latencies in ms behind."""
    facts = {"server": server, "request_rate": rate, "seed": seed}
    encode = msgspec.json.Encoder().encode
    lines = []
    for record in records:
        tpot_s, ttft_s = record.tpot_s, record.ttft_s
        derived = {
            "ttft_ms": None if ttft_s is None else 1000 * ttft_s,
            "tpot_ms": None if tpot_s is None else 1000 * tpot_s,
            "e2el_ms": 1000 * record.e2el_s,
        }
        lines.append(encode({**facts, **msgspec.to_builtins(record), **derived}) + b"\n")
    return b"".join(lines)
