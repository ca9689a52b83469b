"""What the HTTP side of the proxy asks of the side that talks to workers, and a fake of it that ships.

`proxy.app` knows text and HTTP, an `Engine` knows requests, attempts and workers; token ids pass between them and
nothing else does. `FakeEngine` replays a script, one step at a time if asked, so that a test decides the order in
which things happen.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from baton.node.messages.control import Load, Logprob, SamplingParams
from baton.proxy.metrics.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one generation; the last one of a generation has a `finish`, and none follows it."""

    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    """One for each id where the request asked for log probabilities, else empty."""
    finish: str = ""
    """"" | "stop" | "length"."""
    cached_tokens: int = 0
    """Prompt tokens that nobody had to compute; valid from the first delta on."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One registered worker as the proxy sees it."""

    worker: str
    role: str
    state: str
    load: Load
    block_tokens: int = 0
    """0: it has no pool."""


class Engine(Protocol):
    """Turns a prompt into tokens; `proxy.app` is its only caller."""

    def generate(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        timeout_s: float,
        priority: int = 0,
        session_key: bytes = b"",
        timeline: Timeline | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas up to and including the one with a finish; nothing starts before the first iteration.

        `session_key` is what the policy `session` routes by. What happens to the request is stamped on `timeline`, if
        somebody wants to know.
        Raises BadRequest, Overloaded, PeerLost or DeadlineExceeded on iteration. `aclose()`, or the cancellation of
        the task that iterates, cancels both legs.
        """
        ...

    def ready(self) -> str:
        """Empty if a request can be served now, else the reason why not."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together; 0 until a worker has registered."""
        ...

    def worker_loads(self) -> list[WorkerStatus]: ...

    def counters(self) -> Mapping[str, float]:
        """Totals since the start, by name: `routed_local_total`, `attempts_total`, `worker_lost_total` ..."""
        ...


@dataclass(frozen=True, slots=True)
class AppSettings:
    """What the HTTP side must be told; all sizes, counts and times of a request are bounded by these."""

    served_model_name: str
    api_keys: tuple[str, ...] = ()
    """Empty: no key is asked for."""
    request_timeout_s: float = 600.0
    max_body_bytes: int = 10 << 20
    max_prompts: int = 64
    """Prompts in one completion request."""
    max_n: int = 16
    """Answers to one prompt."""
    max_requests: int = 1024
    """HTTP requests that are being answered at once; the next one gets 429."""
    default_chat_tokens: int = 4096
    """Where a chat request says no max_tokens: this, or what fits if that is less."""
    default_completion_tokens: int = 16
    """The same for /v1/completions; OpenAI documents 16."""
    probe_timeout_s: float = 10.0
    """How long /health_generate waits for its token."""
    slow_request_s: float = math.inf
    """A generation that takes longer is told in the log, with its whole timeline."""
    debug_requests: int = 0
    """Generations that are over and can be looked up at /debug/requests; 0: there is no such route."""
    metrics: bool = True
    version: str = "0"


@dataclass(frozen=True, slots=True)
class Call:
    """One `generate` that the fake has seen."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float
    priority: int
    session_key: bytes


Step = Delta | Exception | asyncio.Event
Script = Callable[[Call], list[Step]]


@dataclass(slots=True)
class FakeEngine:
    """Replays, for each call, what `script` returns: deltas are yielded, exceptions raised, events waited for."""

    script: Script
    not_ready: str = ""
    model_len: int = 2048
    workers: list[WorkerStatus] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)
    """Request ids whose generator was closed, or whose task was cancelled, before its script's end."""
    on_cancel: Callable[[str], None] = lambda _: None

    async def generate(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        timeout_s: float,
        priority: int = 0,
        session_key: bytes = b"",
        timeline: Timeline | None = None,
    ) -> AsyncGenerator[Delta, None]:
        call = Call(request_id, prompt_ids, sampling, timeout_s, priority, session_key)
        self.calls.append(call)
        self.running.add(request_id)
        try:
            for step in self.script(call):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(request_id)
            self.on_cancel(request_id)
            raise
        finally:
            self.running.discard(request_id)

    def ready(self) -> str:
        return self.not_ready

    @property
    def max_model_len(self) -> int:
        return self.model_len

    def worker_loads(self) -> list[WorkerStatus]:
        return list(self.workers)

    def counters(self) -> Mapping[str, float]:
        return dict(self.totals)
