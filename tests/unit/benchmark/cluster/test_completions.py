"""Guards the completions of cluster benchmarks: when requests are sent, what is counted, and that failures raise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from baton.benchmark.cluster.completions import CompletionClient, TimedRequest
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.load import null_server

NOTHING_LISTENS = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def client() -> Iterator[CompletionClient]:
    """Of a null server in a thread of its own: a client runs its own event loop."""
    loop, ports = asyncio.new_event_loop(), []

    async def serve() -> None:
        server = await null_server.start(null_server.NullServerSettings())
        ports.append(server.sockets[0].getsockname()[1])
        started.set()

    started = threading.Event()
    thread = threading.Thread(target=lambda: (loop.create_task(serve()), loop.run_forever()))
    thread.start()
    assert started.wait(60)
    yield CompletionClient(f"http://127.0.0.1:{ports[0]}", "null")
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_answers_come_with_counts_and_texts(client: CompletionClient) -> None:
    """A text of another request, or a lost chunk, would look like a wrong token of the server."""
    answers = client.at_once([[1, 2], [3]], max_tokens=4)
    assert [(a.prompt_tokens, a.completion_tokens, a.cached_tokens) for a in answers] == [(2, 4, 0), (1, 4, 0)]
    assert [a.outcome.text for a in answers] == [" token" * 4] * 2
    assert all(len(a.outcome.gaps_s) == 3 and a.ttft_s > 0 for a in answers)


def test_requests_in_turn_do_not_overlap(client: CompletionClient) -> None:
    """Beside one another they would measure a loaded server."""
    first, second = client.in_turn([([1], 3), ([1], 2)])
    assert first.outcome.last_s <= second.due_s


def test_requests_are_sent_when_they_are_due(client: CompletionClient) -> None:
    """Sent early, a request would have a negative TTFT."""
    late, early = client.when_due([TimedRequest(0.05, [1], 1, {}), TimedRequest(0.0, [1], 1, {"user": "x"})])
    assert late.due_s - early.due_s == pytest.approx(0.05)
    assert late.ok and early.ok and late.ttft_s > 0 and early.ttft_s > 0


def test_a_request_that_fails_is_no_measurement(client: CompletionClient) -> None:
    """Its time would count as that of a fast answer."""
    refused = client.when_due([TimedRequest(0.0, [1], 3, {"max_tokens": "many"})])
    assert not refused[0].ok and refused[0].outcome.error.startswith("HTTP 400")
    with pytest.raises(BenchmarkFailed, match="cannot connect"):
        CompletionClient(NOTHING_LISTENS, "null").first_token([1])
    with pytest.raises(BenchmarkFailed, match="cannot connect"):
        CompletionClient(NOTHING_LISTENS, "null").complete("x", 1)
