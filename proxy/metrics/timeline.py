"""Where the time of one generation went: a timeline without gaps from the first byte of its request to its end.

It has three segments, cut where an answer was written to the client:

    first byte ── first_token ──► first answer written ── second_token ──► second one ── last_token ──► end

Every moment of a segment belongs to one stage, so the stages of a segment sum to its length exactly; the length of the
first is the TTFT. The proxy's own stages are stamps of one clock. Time with a worker is reported by the worker as
durations of its own clock (`node.messages.Stages`); they are laid against the end of the time that passed here, and
the rest is `network`. So no clock is compared between hosts, and nothing is negative.

Knows no worker, no socket and no metric.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.node.messages.control import Stages

STAGES: dict[str, str] = {
    "admission": "From the first byte of the request until its body is read and checked.",
    "tokenise": "Chat template and tokenizer.",
    "queue": "Waiting in the proxy for a worker with room, attempts that a worker answered with Busy included.",
    "route": "Hashing the prompt's blocks, and making the messages to the workers.",
    "retry": "Attempts that failed, from their dispatch (or their last token) to the failure.",
    "in_flight": "With the workers, where the request ended before they reported more.",
    "prefill_queue": "Waiting in the worker that computes the prompt.",
    "tier_load": "Loading KV of the prompt from a tier below the worker's pool.",
    "prefill": "From the first step with a token of the prompt to the first token.",
    "transfer_wait": "After the first token: waiting until KV moves (reservation, offer, credit).",
    "transfer": "After that: until the last block has arrived and is verified.",
    "decode_admission": "KV has arrived; waiting for decode's next step.",
    "first_step": "The step that draws the next token.",
    "network": "The rest of a leg: messages that are being sent, in flight, or waiting to be read.",
    "reply": "From the token's arrival in the proxy to its answer written: text, JSON, the client's socket.",
    "decode": "Decoding from the second token on.",
}
"""All stages, in the order in which they are shown, and what each is."""

FIRST_TOKEN, SECOND_TOKEN, LAST_TOKEN = "first_token", "second_token", "last_token"
# fmt: off
USUAL: dict[str, tuple[str, ...]] = {
    FIRST_TOKEN: ("admission", "tokenise", "queue", "route", "retry", "prefill_queue", "tier_load", "prefill",
                  "network", "reply"),
    SECOND_TOKEN: ("transfer_wait", "transfer", "decode_admission", "first_step", "network", "reply"),
    LAST_TOKEN: ("decode", "retry"),
}
# fmt: on
"""The segments of a timeline, with the stages that each always shows; others only where they took time."""
_UNTIL = tuple(USUAL)

_REPORTED: tuple[tuple[str, str], ...] = (
    ("first_step", "step_s"),
    ("decode_admission", "admission_s"),
    ("transfer", "transfer_s"),
    ("transfer_wait", "transfer_wait_s"),
    ("prefill", "prefill_s"),
    ("tier_load", "tier_load_s"),
    ("prefill_queue", "queue_s"),
)
"""Stages of a leg, the last one first, each with its field in `Stages`."""

MAX_ATTEMPTS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a timeline; `stages` sum to `total_s`."""

    until: str
    complete: bool
    """It reached what it is named after; else the generation ended in it."""
    total_s: float
    stages: tuple[tuple[str, float], ...]

    def seconds(self, *stages: str) -> float:
        """What these stages took together."""
        return sum(took_s for stage, took_s in self.stages if stage in stages)


@dataclass(slots=True)
class Attempt:
    """The workers of one attempt."""

    prefill: str
    """Empty: decode computed the prompt itself."""
    decode: str
    end: str = ""
    """Why it failed; empty while it has not."""
    handed_over: bool = False
    """Prefill has reported it."""
    sent_bytes: int = 0
    transfer_s: float = 0.0
    """Of the whole transfer, from its first offer on: most of it happens while later chunks are computed."""


class Timeline:
    """The stages of one generation, from its first byte on. Starts in the stage `admission`."""

    def __init__(self, clock: Callable[[], float], started_at: float | None = None) -> None:
        self.last_tokens_at = 0.0
        """When the last tokens arrived; written by the meter."""
        self.num_attempts = 0
        self.attempts: deque[Attempt] = deque(maxlen=MAX_ATTEMPTS_KEPT)
        self.prefix_hash = b""
        self.loaded_tokens: tuple[int, ...] = ()
        """Tokens of the prompt from tiers below a worker's pool, as reported with the first token."""
        self.ended = False
        self._clock = clock
        self._began_at = self._cursor = clock() if started_at is None else started_at
        self._segments: list[Segment] = []
        self._stages: dict[str, float] = {}
        self._stage = "admission"
        self._decoding = False
        self._on_segment: Callable[[Segment], None] = lambda segment: None

    def fork(self, on_segment: Callable[[Segment], None]) -> Timeline:
        """The line of one of several generations with a common beginning; complete segments go to `on_segment`."""
        line = Timeline(self._clock, self._began_at)
        line._cursor, line._stage, line._stages = self._cursor, self._stage, dict(self._stages)
        line._on_segment = on_segment
        return line

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those that are over, in order."""
        return tuple(self._segments)

    # -- the proxy's own stages

    def enter(self, stage: str) -> None:
        """The stage so far ends, and this one begins."""
        self._advance(self._clock())
        self._stage = stage

    def dispatch(self, prefill: str, decode: str, prefix_hash: bytes) -> None:
        """An attempt is with its workers now."""
        self.enter("in_flight")
        self.num_attempts += 1
        self.attempts.append(Attempt(prefill, decode))
        self.prefix_hash = prefix_hash

    def fail_attempt(self, reason: str, *, busy: bool) -> None:
        """The attempt is over: what it took was a retry, or, if a worker was `busy`, a way of queueing."""
        if self._stage == "decode":  # what it brought the client until its last token was not lost
            self._advance(min(max(self.last_tokens_at, self._cursor), self._clock()))
        self._stage = "queue" if busy else "retry"
        self._advance(self._clock())
        self.attempts[-1].end = reason

    def end(self, *, finished: bool) -> None:
        """The generation is over, `finished` or not. Calling it again changes nothing."""
        if self.ended:
            return
        self.ended = True
        if finished and self._stage == "in_flight":
            self._stage = "reply"  # there is nothing more to come from the workers
        self._cut(complete=finished and self._until == LAST_TOKEN)

    # -- reports of workers, and answers written

    def report(self, stages: Stages) -> None:
        """Tokens came with the stages of their leg since its last report: they end now, the rest is `network`."""
        now = self._clock()
        left_s = now - self._cursor
        self._cursor = now
        for stage, field in _REPORTED:
            took_s = min(getattr(stages, field), left_s)
            self._add(stage, took_s)
            left_s -= took_s
        self._add("network", left_s)
        self._decoding = self._decoding or stages.step_s > 0.0
        if self._until == FIRST_TOKEN:
            self.loaded_tokens = stages.loaded_tokens or self.loaded_tokens
        self._stage = "decode" if self._until == LAST_TOKEN else "reply"

    def handed_over(self, sent_bytes: int, transfer_s: float) -> None:
        """The attempt's KV is with its decode worker."""
        attempt = self.attempts[-1]
        attempt.handed_over, attempt.sent_bytes, attempt.transfer_s = True, sent_bytes, transfer_s

    def shown(self) -> bool:
        """An answer was written to the client: the segment ends. False once no further call is needed."""
        if self.ended or self._until == LAST_TOKEN:
            return False
        self._cut(complete=True)
        over = self._until == LAST_TOKEN
        self._stage = "decode" if over or self._decoding else "in_flight"
        return not over

    # -- inside

    @property
    def _until(self) -> str:
        return _UNTIL[min(len(self._segments), len(_UNTIL) - 1)]

    def _advance(self, now: float) -> None:
        self._add(self._stage, now - self._cursor)
        self._cursor = now

    def _add(self, stage: str, took_s: float) -> None:
        if took_s > 0.0:
            self._stages[stage] = self._stages.get(stage, 0.0) + took_s

    def _cut(self, *, complete: bool) -> None:
        until, now = self._until, self._clock()
        self._advance(now)
        usual = USUAL[until]
        stages = tuple((s, self._stages.get(s, 0.0)) for s in STAGES if s in usual or s in self._stages)
        segment = Segment(until, complete, now - self._began_at, stages)
        self._segments.append(segment)
        self._stages, self._began_at = {}, now
        self._on_segment(segment)
