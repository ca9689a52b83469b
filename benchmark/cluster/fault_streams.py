"""Streams under faults: clients that read one after the other, and what became of each beside an undisturbed run.

A stream is right (whole, and the same text), refused (one clear error, the text so far right), broken (its connection
was lost, which only the death of a proxy explains), hung (nothing came for HUNG_S), or wrong. On a GPU a new attempt
computes the KV of its answer so far as a prompt, with other roundings: a stream that is whole and differs only behind a
pause in its text is `rounded` there, and `forks.py` says how close the two tokens were.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from baton.benchmark.cluster.completions import random_ids

HUNG_S = 40.0
PAUSE_S = 0.05
"""No stream waits so long between two tokens unless its attempt failed, or waits for a frozen process."""
ROUNDING = 0.25
"""The largest distance of two log probabilities that other roundings of bfloat16 may turn round: some of its steps."""
RIGHT, ROUNDED, WRONG, HUNG = "right", "rounded", "wrong", "hung"
REFUSED, BROKEN, BLAMED = "refused", "broken", "blamed"
VERDICTS = (RIGHT, ROUNDED, WRONG, HUNG, REFUSED, BROKEN, BLAMED)
"""blamed: an error of 400 or so, though the request was good."""
AFTER_REFUSAL_S = 1.0
SHORTEST = 20
"""Tokens of the shortest prompt."""


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """One request. `seed` is None for a greedy one."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None

    def body(self, model: str) -> bytes:
        sampling = {"temperature": 0} if self.seed is None else {"temperature": 0.8, "seed": self.seed}
        fields = {"model": model, "prompt": self.prompt, "max_tokens": self.max_tokens, "ignore_eos": True}
        return json.dumps({**fields, **sampling, "stream": True, "return_token_ids": True}).encode()


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a whole greedy stream left the text that it has without faults."""

    place: int
    """Tokens before it."""
    margin: float | None
    """The log probability of the undisturbed token less that of the stream's; None: that is not among the likeliest."""

    @property
    def is_rounding(self) -> bool:
        return self.margin is not None and abs(self.margin) <= ROUNDING


@dataclass(slots=True)
class StreamResult:
    """What came. Times are those of time.monotonic."""

    request: StreamRequest
    began_s: float
    ended_s: float = 0.0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    error: str = ""
    status: int = 0
    end: str = ""
    """"timeout" or "lost", where the connection did not end in order."""
    gap_s: float = 0.0
    """The longest time without a chunk."""
    text_before_pause: str = ""
    first_pause: int | None = None
    """Tokens before the first pause of PAUSE_S behind the first of them."""
    fork: Fork | None = None
    """Once it is known; of greedy streams only."""

    @property
    def is_greedy(self) -> bool:
        return self.request.seed is None

    def verdict(self, right_text: str, *, exact: bool = True) -> str:
        """`exact`: a new attempt has the roundings of the first one."""
        if not right_text.startswith(self.text):
            return ROUNDED if self.finished and not exact and self._may_be_rounded(right_text) else WRONG
        if self.end == "timeout":
            return HUNG
        if self.finished:
            return RIGHT if self.text == right_text else WRONG
        if 400 <= self.status < 500 and self.status != 429:
            return BLAMED
        return REFUSED if self.error else BROKEN

    def _may_be_rounded(self, right_text: str) -> bool:
        """Sampled streams may change behind a pause; what greedy ones have changed is known better."""
        if self.first_pause is None or not right_text.startswith(self.text_before_pause):
            return False
        return self.fork is None or self.fork.is_rounding


def read_stream(port: int, model: str, request: StreamRequest, hung_s: float = HUNG_S) -> StreamResult:
    """One streamed completion from its first byte to its last."""
    result = StreamResult(request, time.monotonic())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=hung_s)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", request.body(model), headers)
        answer = connection.getresponse()
        result.status = answer.status
        if answer.status != 200:
            result.error = answer.read().decode(errors="replace")[:300]
        else:
            _read_events(answer, result)
    except TimeoutError:
        result.end = "timeout"
    except ConnectionRefusedError:
        result.error = "no proxy listens"
    except (OSError, http.client.HTTPException, ValueError):
        result.end = "lost"
    finally:
        connection.close()
        result.ended_s = time.monotonic()
    return result


def _read_events(answer: http.client.HTTPResponse, result: StreamResult) -> None:
    last_s = result.began_s
    for line in answer:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        now = time.monotonic()
        pause_s, last_s = now - last_s, now
        result.gap_s = max(result.gap_s, pause_s)
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            result.error = str(chunk["error"])[:300]
            code = chunk["error"].get("code")
            result.status = code if isinstance(code, int) else result.status
        if result.token_ids and result.first_pause is None and pause_s >= PAUSE_S:
            result.first_pause, result.text_before_pause = len(result.token_ids), result.text
        for choice in chunk.get("choices", ()):
            result.text += choice["text"]
            result.token_ids += choice.get("token_ids") or ()
            result.finished = result.finished or choice["finish_reason"] is not None


def requests(seed: int, client: int, max_tokens: int, longest: int) -> Iterator[StreamRequest]:
    """Those of one client, without end: no prompt twice, every other one sampled."""
    number = 0
    while True:
        length = SHORTEST + 37 * (number * 7 + client) % (longest - SHORTEST)
        prompt = tuple(random_ids(length, seed, client, number))
        yield StreamRequest(prompt, max_tokens, number if number % 2 else None)
        number += 1


@dataclass(slots=True)
class FaultClients:
    """Threads that stream one request after the other until `stop`."""

    read: Callable[[StreamRequest], StreamResult]
    results: list[StreamResult] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, count: int, seed: int, max_tokens: int, longest: int) -> None:
        for client in range(count):
            todo = requests(seed, client, max_tokens, longest)
            thread = threading.Thread(target=self._run, args=(todo,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Let each stream end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, todo: Iterator[StreamRequest]) -> None:
        for request in todo:
            if self._stopping.is_set():
                return
            result = self.read(request)
            self.results.append(result)
            if not result.finished:
                self._stopping.wait(AFTER_REFUSAL_S)
