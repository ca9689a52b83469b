"""Metrics: the names that dashboards know, counted right on every path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from node.errors import Overloaded, PeerLost
from node.messages import Load
from proxy.interface import Call, Delta, FakeEngine, Step, WorkerStatus
from proxy.metrics import SECONDS, Metrics

Says = Callable[..., Callable[[Call], list[Step]]]
COMPLETION = {"model": "demo", "prompt": "Hi"}
KNOWN = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "baton:request_failures_total",
}


class Scrape:
    """The samples of one scrape, by name and a part of their labels."""

    def __init__(self, exposition: str) -> None:
        families = text_string_to_metric_families(exposition)
        self.samples = [sample for family in families for sample in family.samples]
        self.names = {sample.name for sample in self.samples}

    def __call__(self, name: str, **labels: str) -> float:
        (value,) = [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return float(value)


async def scrape(client: httpx.AsyncClient) -> Scrape:
    return Scrape((await client.get("/metrics")).text)


async def test_known_names_are_there_at_zero_before_the_first_request(client: httpx.AsyncClient) -> None:
    """Guards against a dashboard or an alert that finds no series, or sees the first failure as no change."""
    before = await scrape(client)
    assert before.names >= KNOWN
    for sample in before.samples:
        assert sample.name.endswith("_created") or sample.value == 0.0, sample
        assert sample.labels["model_name"] == "demo"
    kinds = {sample.labels["kind"] for sample in before.samples if sample.name == "baton:request_failures_total"}
    assert kinds == {"bad_request", "overloaded", "peer_lost", "deadline", "internal", "disconnected"}


async def test_a_finished_request_is_counted_once(client: httpx.AsyncClient, engine: FakeEngine, says: Says) -> None:
    """Guards against tokens counted by chunk, prompts counted by token, and gauges that do not come back to zero."""
    engine.script = says("Once upon a time.", cached_tokens=1)
    usage = (await client.post("/v1/completions", json={**COMPLETION, "n": 2})).json()["usage"]
    seen = await scrape(client)
    assert seen("vllm:generation_tokens_total") == usage["completion_tokens"]
    assert seen("vllm:prompt_tokens_total") == 2 * usage["prompt_tokens"] == seen("vllm:prefix_cache_queries_total")
    assert seen("vllm:prefix_cache_hits_total") == 2
    assert seen("vllm:request_success_total", finished_reason="stop") == 2
    assert seen("vllm:time_to_first_token_seconds_count") == 2 == seen("vllm:e2e_request_latency_seconds_count")
    assert seen("vllm:inter_token_latency_seconds_count") == usage["completion_tokens"] - 2
    assert seen("vllm:request_generation_tokens_sum") == usage["completion_tokens"]
    assert seen("vllm:num_requests_running") == seen("vllm:num_requests_waiting") == 0


async def test_waiting_and_running(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against gauges that mix up requests before and after their first token."""
    waits, runs, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def script(call: Call) -> list[Step]:
        first = len(engine.calls) == 1
        (runs if first else waits).set()
        end = Delta((300,), (), "length")
        return [Delta((300,)), go_on, end] if first else [go_on, end]

    engine.script = script
    running = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
    await runs.wait()
    waiting = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
    await waits.wait()
    seen = await scrape(client)
    assert (seen("vllm:num_requests_running"), seen("vllm:num_requests_waiting")) == (1, 1)
    go_on.set()
    await asyncio.gather(running, waiting)
    seen = await scrape(client)
    assert (seen("vllm:num_requests_running"), seen("vllm:num_requests_waiting")) == (0, 0)


async def test_failures_are_counted_by_kind(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against failures that no metric shows, and gauges that a failure leaves standing."""
    for error, kind in (
        (PeerLost("gone"), "peer_lost"),
        (Overloaded("full"), "overloaded"),
        (ValueError(), "internal"),
    ):
        engine.script = lambda call, error=error: [Delta((300,)), error]  # type: ignore[misc]
        await client.post("/v1/completions", json=COMPLETION)
        assert (await scrape(client))("baton:request_failures_total", kind=kind) == 1
    await client.post("/v1/completions", json={})
    seen = await scrape(client)
    assert seen("baton:request_failures_total", kind="bad_request") == 1
    assert seen("vllm:request_success_total", finished_reason="abort") == 3
    assert seen("vllm:num_requests_running") == seen("vllm:num_requests_waiting") == 0
    assert seen("vllm:e2e_request_latency_seconds_count") == 0


def status(name: str, role: str, free: int, **counters: float) -> WorkerStatus:
    return WorkerStatus(name, role, "up", Load(running=2, free_blocks=free, total_blocks=100, counters=counters))


async def test_the_engines_and_the_workers_own_counters(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against what workers report being lost on the way, and a name that breaks the format."""
    engine.totals = {"attempts_total": 3.0, "routed_local_total": 1.0}
    engine.workers = [status("p0", "prefill", 90, transfers=4), status("d0", "decode", 25, **{"odd name-1": 5})]
    seen = await scrape(client)
    assert seen("baton:attempts_total") == 3
    assert seen("baton:routed_local_total") == 1
    assert seen("baton:worker_transfers_total", worker="p0", role="prefill") == 4
    assert seen("baton:worker_odd_name_1_total", worker="d0") == 5
    assert seen("baton:worker_running", worker="d0") == 2
    assert seen("baton:worker_up", worker="p0", state="up") == 1
    assert seen("vllm:kv_cache_usage_perc") == 0.75


async def test_preemptions_never_fall(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a counter that falls when a worker leaves or restarts, which a rate reads as a burst."""
    totals = []
    reports: Iterable[list[WorkerStatus]] = (
        [status("d0", "decode", 0, preemptions=5), status("d1", "decode", 0, preemptions=2)],
        [status("d1", "decode", 0, preemptions=3)],
        [status("d0", "decode", 0, preemptions=1), status("d1", "decode", 0, preemptions=3)],
    )
    for engine.workers in reports:
        totals.append((await scrape(client))("vllm:num_preemptions_total"))
    assert totals == [7, 8, 9]


def test_times_are_those_of_the_clock() -> None:
    """Guards against TPOT or gaps that include the wait for the first token."""
    now = iter([1.0, 1.5, 2.5])
    metrics = Metrics(FakeEngine(lambda call: []), "demo", clock=lambda: next(now))
    track = metrics.track(7, arrived_s=0.0)
    for _ in range(3):
        track.tokens(1, 0)
    track.close("length")
    seen = Scrape(metrics.exposition().decode())
    assert seen("vllm:time_to_first_token_seconds_sum") == 1.0
    assert seen("vllm:inter_token_latency_seconds_sum") == 1.5
    assert seen("vllm:request_time_per_output_token_seconds_sum") == 0.75
    assert seen("vllm:e2e_request_latency_seconds_sum") == 2.5
    assert seen("vllm:request_decode_time_seconds_sum") == 1.5


def test_two_apps_share_nothing() -> None:
    """Guards against a global registry, in which a second app in one process cannot be made."""
    first, second = (Metrics(FakeEngine(lambda call: []), "demo") for _ in range(2))
    first.track(3, 0.0)
    assert Scrape(first.exposition().decode())("vllm:num_requests_waiting") == 1
    assert Scrape(second.exposition().decode())("vllm:num_requests_waiting") == 0


def test_buckets_reach_from_a_fast_token_to_a_slow_request() -> None:
    """Guards against everything falling into one bucket; bounds must also ascend, or Prometheus refuses them."""
    assert SECONDS[0] == 0.0005 and SECONDS[-1] == 160.0
    assert list(SECONDS) == sorted(set(SECONDS))
