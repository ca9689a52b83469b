"""Requests of a benchmark that asks one thing at a time, or a few at once: random prompts, answers with their times."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from baton.benchmark.cluster.cluster import MODEL, BenchmarkFailed

REQUEST_TIMEOUT_S = 120.0
FIRST_ID, LAST_ID = 300, 4000
"""Token ids that are plain text in the demo model's vocabulary."""


def random_ids(length: int, *seed: object) -> list[int]:
    """The same ones for the same seed; a longer prompt begins with a shorter one's."""
    draw = random.Random("/".join(map(str, seed)))
    return [draw.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens`: as the API shows them, no two alike (a part of a character by its bytes)."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


def complete(port: int, ids: Sequence[int], max_tokens: int) -> Answer:
    """One greedy completion with its tokens. Raises BenchmarkFailed."""
    body: dict[str, Any] = {"model": MODEL, "prompt": ids, "max_tokens": max_tokens, "temperature": 0}
    data = json.dumps(body | {"ignore_eos": True, "logprobs": 0}).encode()
    with _posting(port) as connection:
        connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    if answer.status != 200:
        raise BenchmarkFailed(f"HTTP {answer.status}: {text[:500]!r}")
    found = json.loads(text)["choices"][0]["logprobs"]
    return Answer(tuple(found["tokens"]), tuple(found["token_logprobs"]))


@dataclass(frozen=True, slots=True)
class First:
    """The first token of a streamed answer, and what the server says of its prompt."""

    ttft_s: float
    cached_tokens: int


def first_token(port: int, ids: Sequence[int], max_tokens: int = 1) -> First:
    """One greedy completion, read to its end. Raises BenchmarkFailed."""
    body: dict[str, Any] = {"model": MODEL, "prompt": ids, "max_tokens": max_tokens, "temperature": 0}
    data = json.dumps(body | {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}).encode()
    with _posting(port) as connection:
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        answer = connection.getresponse()
        head = answer.readline()
        ttft_s = time.perf_counter() - begin
        lines = (head + answer.read()).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    if answer.status != 200 or usage is None:
        raise BenchmarkFailed(f"HTTP {answer.status}: {lines[-1:]!r}")
    return First(ttft_s, usage["prompt_tokens_details"]["cached_tokens"])


@contextmanager
def _posting(port: int) -> Iterator[http.client.HTTPConnection]:
    """A connection; what the network does to it is BenchmarkFailed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.connect()
        yield connection
    except (OSError, http.client.HTTPException) as error:
        raise BenchmarkFailed(f"no answer: {error!r}") from None
    finally:
        connection.close()


def complete_at_once(port: int, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    """All of them beside each other, with their tokens."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda ids: complete(port, ids, max_tokens), prompts))
