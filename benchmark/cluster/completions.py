"""Greedy completions for benchmarks that send one at a time, some at once, or each when it is due.

Requests go through the HTTP client and the meter of the load test. What they ask for, and what the answers mean, is the
benchmark's.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from uvicorn.loops.auto import auto_loop_factory

from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.load.client import StreamOutcome, send
from baton.benchmark.load.runner import RealClock
from baton.node.http_client import HttpClient, HttpFailed, Origin

REQUEST_TIMEOUT_S = 300.0
FIRST_ID, LAST_ID = 300, 4000
"""Token ids that are plain text in the demo model's vocabulary."""
PATH = "/v1/completions"

T = TypeVar("T")
Prompt = str | Sequence[int]


def random_ids(length: int, *seed: object) -> list[int]:
    """Random token ids. Equal for equal seeds; a longer prompt begins with a shorter one's."""
    draw = random.Random("/".join(map(str, seed)))
    return [draw.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer that came as a whole."""

    text: str
    tokens: tuple[str, ...]
    """As the API shows them, no two alike (a part of a character by its bytes)."""
    logprobs: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Streamed:
    """A streamed answer. Times are those of time.perf_counter."""

    due_s: float
    outcome: StreamOutcome

    @property
    def ok(self) -> bool:
        """Whether it came to its end, with the server's count of tokens."""
        return not self.outcome.error and self.outcome.usage is not None

    @property
    def ttft_s(self) -> float:
        assert self.outcome.first_s is not None, self.outcome
        return self.outcome.first_s - self.due_s

    @property
    def prompt_tokens(self) -> int:
        return self.outcome.usage.prompt_tokens if self.outcome.usage else 0

    @property
    def completion_tokens(self) -> int:
        return self.outcome.usage.completion_tokens if self.outcome.usage else 0

    @property
    def cached_tokens(self) -> int:
        details = self.outcome.usage.prompt_tokens_details if self.outcome.usage else None
        return (details.cached_tokens or 0) if details else 0


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """`due_s` counts from the start of the run; `extra` are more fields of the body."""

    due_s: float
    prompt: Prompt
    max_tokens: int
    extra: Mapping[str, object]


class CompletionClient:
    """Asks one server for greedy completions of exactly `max_tokens` tokens."""

    def __init__(self, url: str, model: str, api_key: str = "") -> None:
        self._origin = Origin.parse(url)
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._model = model

    def complete(self, prompt: Prompt, max_tokens: int) -> Completion:
        """Raises BenchmarkFailed where there is no answer, as all methods but `when_due` do."""
        return self.complete_all([prompt], max_tokens)[0]

    def complete_all(
        self, prompts: Sequence[Prompt], max_tokens: int, concurrency: int | None = None
    ) -> list[Completion]:
        """All at once, or at most `concurrency` at a time, begun in their order."""
        places = asyncio.Semaphore(concurrency or len(prompts))

        async def one(http: HttpClient, prompt: Prompt) -> Completion:
            async with places:
                return await self._complete(http, self._body(prompt, max_tokens, {"logprobs": 0}))

        async def all_of_them(http: HttpClient) -> list[Completion]:
            return list(await asyncio.gather(*(one(http, prompt) for prompt in prompts)))

        return self._run(all_of_them)

    def first_token(self, prompt: Prompt, max_tokens: int = 1) -> Streamed:
        """One streamed completion, read to its end."""
        return self.in_turn([(prompt, max_tokens)])[0]

    def in_turn(self, requests: Sequence[tuple[Prompt, int]]) -> list[Streamed]:
        """(prompt, max_tokens) one after the other, streamed; each is due when the one before has ended."""

        async def all_of_them(http: HttpClient) -> list[Streamed]:
            await _connect(http, 1)
            found = []
            for prompt, max_tokens in requests:
                request = self._stream_request(http, prompt, max_tokens, {})
                begin = time.perf_counter()
                outcome = await send(http, request, REQUEST_TIMEOUT_S, time.perf_counter)
                found.append(Streamed(begin, outcome))
            return found

        return _all_ok(self._run(all_of_them))

    def at_once(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Streamed]:
        """All of them streamed beside each other, with their texts."""
        return _all_ok(self.when_due([TimedRequest(0.0, prompt, max_tokens, {}) for prompt in prompts], keep_text=True))

    def when_due(self, requests: Sequence[TimedRequest], keep_text: bool = False) -> list[Streamed]:
        """Open loop: each is streamed when it is due, whatever became of the others. Failures are in the outcomes."""
        clock = RealClock()

        async def one(http: HttpClient, data: bytes, due_s: float) -> Streamed:
            await clock.sleep_until(due_s)
            return Streamed(due_s, await send(http, data, REQUEST_TIMEOUT_S, clock.now_s, keep_text=keep_text))

        async def all_of_them(http: HttpClient) -> list[Streamed]:
            await _connect(http, max(1, sum(request.due_s == 0 for request in requests)))
            sent = [(self._stream_request(http, r.prompt, r.max_tokens, r.extra), r.due_s) for r in requests]
            begin = clock.now_s()
            return list(await asyncio.gather(*(one(http, data, begin + due_s) for data, due_s in sent)))

        return self._run(all_of_them)

    def _run(self, work: Callable[[HttpClient], Awaitable[T]]) -> T:
        async def run() -> T:
            with closing(HttpClient(self._origin, self._headers, time.perf_counter)) as http:
                return await work(http)

        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop where it is installed
            try:
                return runner.run(run())
            except (HttpFailed, TimeoutError) as error:
                raise BenchmarkFailed(f"no answer: {error!r}") from None

    async def _complete(self, http: HttpClient, body: bytes) -> Completion:
        parts: list[bytes] = []

        def sink(data: bytes, _: float) -> bool:
            parts.append(data)
            return True

        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            status = await http.exchange(http.request("POST", PATH, body), sink)
        text = b"".join(parts)
        if status != 200:
            raise BenchmarkFailed(f"HTTP {status}: {text[:500]!r}")
        answer = json.loads(text)
        choice = answer["choices"][0]
        tokens, logprobs = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
        return Completion(choice["text"], tuple(tokens), tuple(logprobs), answer["usage"]["prompt_tokens"])

    def _stream_request(self, http: HttpClient, prompt: Prompt, max_tokens: int, extra: Mapping[str, object]) -> bytes:
        stream = {"stream": True, "stream_options": {"include_usage": True}, **extra}
        return http.request("POST", PATH, self._body(prompt, max_tokens, stream))

    def _body(self, prompt: Prompt, max_tokens: int, extra: Mapping[str, object]) -> bytes:
        fields = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return json.dumps({**fields, "ignore_eos": True, **extra}).encode()


async def _connect(http: HttpClient, count: int) -> None:
    """Open connections before the clock starts: the client keeps them."""
    await asyncio.gather(*(http.get("/v1/models") for _ in range(count)))


def _all_ok(answers: list[Streamed]) -> list[Streamed]:
    bad = next((answer for answer in answers if not answer.ok), None)
    if bad is not None:
        raise BenchmarkFailed(f"a request failed: {bad.outcome.error or 'the server counted no tokens'}")
    return answers
