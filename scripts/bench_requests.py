"""Requests of a benchmark that asks one thing at a time, or a few at once: random prompts, answers with their times."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from scripts.bench_cluster import MODEL, BenchmarkFailed

REQUEST_TIMEOUT_S = 120.0
FIRST_ID, LAST_ID = 300, 4000
"""Token ids that are plain text in the demo model's vocabulary."""


def random_ids(length: int, *seed: object) -> list[int]:
    """The same ones for the same seed; a longer prompt begins with a shorter one's."""
    draw = random.Random("/".join(map(str, seed)))
    return [draw.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens`: as the API shows them, no two alike (a part of a character by its bytes); empty if not asked for."""

    seconds: float
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


def complete(port: int, ids: Sequence[int], max_tokens: int = 1, *, tokens: bool = False) -> Answer:
    """One greedy completion; with one token its time is the TTFT. Raises BenchmarkFailed."""
    body: dict[str, Any] = {"model": MODEL, "prompt": ids, "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True} | ({"logprobs": 0} if tokens else {})
    data = json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.connect()
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        seconds = time.perf_counter() - begin
    except (OSError, http.client.HTTPException) as error:
        raise BenchmarkFailed(f"no answer: {error!r}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchmarkFailed(f"HTTP {answer.status}: {text[:500]!r}")
    found = json.loads(text)["choices"][0]["logprobs"] if tokens else {"tokens": (), "token_logprobs": ()}
    return Answer(seconds, tuple(found["tokens"]), tuple(found["token_logprobs"]))


def complete_at_once(port: int, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    """All of them beside each other, with their tokens."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda ids: complete(port, ids, max_tokens, tokens=True), prompts))
