"""Metrics: the names that dashboards know, counted right on every path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

import httpx
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families

from baton.node.errors import Overloaded, PeerLost
from baton.node.messages.control import Load, SamplingSpec, Stages
from baton.proxy.interface import Delta, WorkerStatus
from baton.proxy.metrics.collector import MAX_UNDESCRIBED, MAX_UNDESCRIBED_SERIES, ReportCollector
from baton.proxy.metrics.counters import ENGINE_COUNTERS, WORKER_COUNTERS
from baton.proxy.metrics.meter import GenerationMeter
from baton.proxy.metrics.metrics import SECONDS, ProxyMetrics
from baton.proxy.metrics.record import GenerationInfo
from baton.proxy.metrics.request_log import RequestLog
from baton.proxy.metrics.timeline import Timeline
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

Says = Callable[..., Callable[[EngineCall], list[ScriptStep]]]
COMPLETION = {"model": "demo", "prompt": "Hi"}
KNOWN = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_queries_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "baton:request_failures_total",
    "baton:request_stage_seconds_bucket",
    "baton:transfer_seconds_bucket",
    "baton:ttft_by_source_seconds_bucket",
    "baton:prompt_tokens_total",
    "baton:workers",
    "gen_ai_server_time_to_first_token_seconds_bucket",
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
        assert "demo" in (sample.labels.get("model_name"), sample.labels.get("gen_ai_request_model")) or (
            sample.name == "baton:workers" or sample.name.startswith("baton:http_refusals_")
        )
    kinds = {sample.labels["kind"] for sample in before.samples if sample.name == "baton:request_failures_total"}
    assert kinds == {"bad_request", "overloaded", "peer_lost", "deadline", "internal", "disconnected", "slow_reader"}


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

    def script(call: EngineCall) -> list[ScriptStep]:
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
    assert seen("vllm:request_success_total", finished_reason="error") == 3
    assert seen("vllm:request_success_total", finished_reason="abort") == 0
    assert seen("vllm:num_requests_running") == seen("vllm:num_requests_waiting") == 0
    assert seen("vllm:e2e_request_latency_seconds_count") == 0


def status(name: str, role: str, free: int, **counters: float) -> WorkerStatus:
    return WorkerStatus(name, role, "up", Load(running=2, free_blocks=free, total_blocks=100, counters=counters))


async def test_the_engines_and_the_workers_own_counters(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against what workers report being lost on the way, and a name that breaks the format."""
    engine.totals = {"attempts_total": 3.0, "routed_local_total": 1.0}
    odd = {"odd name-1": 5, "unheard_of": 6}
    engine.workers = [status("p0", "prefill", 90, transfers=4), status("d0", "decode", 25, **odd)]
    seen = await scrape(client)
    assert seen("baton:attempts_total") == 3
    assert seen("baton:routed_local_total") == 1
    assert seen("baton:worker_transfers_total", worker="p0", role="prefill") == 4
    assert seen("baton:worker_unheard_of_total", worker="d0") == 6
    assert not [sample for sample in seen.samples if "odd" in sample.name], "no metric can have this name"
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


def info(prompt_tokens: int) -> GenerationInfo:
    return GenerationInfo("r", 0, "chat", "demo", True, prompt_tokens, SamplingSpec(max_tokens=9), 0, {})


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_times_are_those_of_the_clock() -> None:
    """Guards each latency against parts of another, and the TTFT against a sum of stages that is not it."""
    clock = Clock()
    metrics = ProxyMetrics(FakeEngine(lambda call: []), ["demo"], clock)
    line = Timeline(clock).fork(metrics.of("demo").segments_of("chat"))
    track = GenerationMeter(metrics.of("demo"), RequestLog(), info(6), line)
    line.enter("queue")
    clock.now_s += 0.25
    line.dispatch("p0/1", "d0/1", b"")
    clock.now_s += 1.0
    line.report(Stages(queue_s=0.25, tier_load_s=0.125, prefill_s=0.5, loaded_tokens=(0, 3, 0)))
    track.tokens(1, 4)
    clock.now_s += 0.25
    line.shown()
    for _ in range(2):
        clock.now_s += 1.0
        track.tokens(1, 4)
        line.shown()
    clock.now_s += 0.5
    track.close("length")
    seen = Scrape(metrics.exposition().decode())
    assert seen("vllm:time_to_first_token_seconds_sum") == 1.5
    assert seen("vllm:inter_token_latency_seconds_sum") == 2.25
    assert seen("vllm:request_time_per_output_token_seconds_sum") == 1.125
    assert seen("vllm:e2e_request_latency_seconds_sum") == 4.0
    assert seen("vllm:request_decode_time_seconds_sum") == 2.25
    assert seen("vllm:request_queue_time_seconds_sum") == 0.5
    assert seen("vllm:request_prefill_time_seconds_sum") == 0.625
    assert seen("vllm:request_inference_time_seconds_sum") == 2.875
    assert seen("baton:ttft_by_source_seconds_sum", source="disk") == 1.5
    assert seen("gen_ai_server_time_to_first_token_seconds_sum", gen_ai_operation_name="chat") == 1.5
    assert seen("gen_ai_server_request_duration_seconds_sum", gen_ai_operation_name="chat") == 4.0
    stages = [s for s in seen.samples if s.name == "baton:request_stage_seconds_sum"]
    for until, total_s in {"first_token": 1.5, "second_token": 1.0, "last_token": 1.5}.items():
        assert sum(s.value for s in stages if s.labels["until"] == until) == total_s


def test_a_part_that_was_not_reached_is_no_observation() -> None:
    """Guards quantiles against requests that ended before there was anything to measure."""
    metrics = ProxyMetrics(FakeEngine(lambda call: []), ["demo"], Clock())
    line = Timeline(metrics.clock).fork(metrics.of("demo").segments_of("chat"))
    GenerationMeter(metrics.of("demo"), RequestLog(), info(7), line).close("cancelled")
    seen = Scrape(metrics.exposition().decode())
    assert seen("vllm:time_to_first_token_seconds_count") == 0
    assert {s.value for s in seen.samples if s.name == "baton:request_stage_seconds_count"} == {0.0}
    assert seen("vllm:request_success_total", finished_reason="abort") == 1


def test_moved_bytes_belong_to_pairs_that_are_there() -> None:
    """Guards the number of series: a worker that left, and whom it has sent to, are no labels for ever."""
    engine = FakeEngine(lambda call: [], workers=[status("p0", "prefill", 9), status("d0", "decode", 9)])
    metrics = ProxyMetrics(engine, ["demo"], Clock())
    line = Timeline(metrics.clock)
    track = GenerationMeter(metrics.of("demo"), RequestLog(), info(7), line)
    line.dispatch("p0/1", "d0/7", b"")
    line.handed_over(64, 0.5)
    line.fail_attempt("lost", busy=False)
    line.dispatch("p0/1", "d0/8", b"")
    line.handed_over(32, 0.25)
    track.close("peer_lost")
    seen = Scrape(metrics.exposition().decode())
    assert seen("baton:transfer_bytes_total", prefill="p0", decode="d0") == 96
    assert (seen("baton:transfer_seconds_count"), seen("baton:transfer_seconds_sum")) == (2, 0.75)
    engine.workers = engine.workers[:1]
    assert "baton:transfer_bytes_total" not in Scrape(metrics.exposition().decode()).names


async def test_prompt_tokens_by_source_and_pools(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards the hit rate: summed over workers, by source, all sources there; and the size of each pool."""
    engine.workers = [
        status("p0", "prefill", 9, prompt_tokens_gpu=5, prompt_tokens_computed=7),
        replace(status("p1", "prefill", 9, prompt_tokens_gpu=1, prompt_tokens_ram=2), block_tokens=16),
    ]
    seen = await scrape(client)
    found = {s.labels["source"]: s.value for s in seen.samples if s.name == "baton:prompt_tokens_total"}
    assert found == {"gpu": 6, "ram": 2, "disk": 0, "peer": 0, "computed": 7}
    assert (seen("vllm:external_prefix_cache_queries_total"), seen("vllm:external_prefix_cache_hits_total")) == (9, 2)
    (info,) = [s for s in seen.samples if s.name == "vllm:cache_config_info"]
    assert (info.labels["engine"], info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("p1", "16", "100")


def test_a_strict_reader_accepts_every_metric() -> None:
    """Guards against a page that Prometheus refuses whole for one bad line: OpenMetrics' parser is the strict one."""
    worker = status("p0", "prefill", 9, **dict.fromkeys(WORKER_COUNTERS, 1.0))
    engine = FakeEngine(lambda call: [], totals=dict.fromkeys(ENGINE_COUNTERS, 1.0))
    engine.workers = [replace(worker, block_tokens=16)]
    metrics = ProxyMetrics(engine, ["demo"], Clock())
    names = set()
    for registry in (metrics._families.registry, metrics._reports):
        strict = exposition.generate_latest(registry, escaping=exposition.ALLOWUTF8)
        names |= {family.name for family in parser.text_string_to_metric_families(strict.decode())}
    assert names >= {"vllm:request_success", "baton:worker_steps", "baton:request_stage_seconds"}


def test_two_apps_share_nothing() -> None:
    """Guards against a global registry, in which a second app in one process cannot be made."""
    first, second = (ProxyMetrics(FakeEngine(lambda call: []), ["demo"]) for _ in range(2))
    GenerationMeter(first.of("demo"), RequestLog(), info(3), Timeline(first.clock))
    assert Scrape(first.exposition().decode())("vllm:num_requests_waiting") == 1
    assert Scrape(second.exposition().decode())("vllm:num_requests_waiting") == 0


def test_buckets_reach_from_a_fast_token_to_a_slow_request() -> None:
    """Guards against everything falling into one bucket; bounds must also ascend, or Prometheus refuses them."""
    assert SECONDS[0] == 0.0005 and SECONDS[-1] == 160.0
    assert list(SECONDS) == sorted(set(SECONDS))


def test_counters_that_workers_invent_are_bounded() -> None:
    """Guards the page against heartbeats with ever new names, and labels against ones that no page can hold."""
    engine = FakeEngine(lambda _: [])
    odd = ["Upper", "a b", 'a"', "\x1b", "a" * 65, "1a", "é"]
    engine.workers = [
        WorkerStatus(f"s{n}", "store", "up", Load(counters={f"made_up_{n}_{m}": 1.0 for m in range(50)}))
        for n in range(200)
    ] + [WorkerStatus("w", "decode", "up", Load(counters=dict.fromkeys(odd, 1.0)))]
    names = {metric.name for metric in ReportCollector(engine, ["demo"]).collect()}
    assert sum("made_up" in name for name in names) == MAX_UNDESCRIBED
    assert all(name.removeprefix("baton:worker_") not in odd for name in names)


def test_counters_of_all_members_together_are_bounded() -> None:
    """Guards the page, and the time that it takes, against as many members as a proxy has, each with counters of its
    own: half a million series."""
    engine = FakeEngine(lambda _: [])
    counters = {f"made_up_{number}": 1.0 for number in range(MAX_UNDESCRIBED)}
    engine.workers = [WorkerStatus(f"w{number}", "decode", "up", Load(counters=counters)) for number in range(4096)]
    families = [each for each in ReportCollector(engine, ["demo"]).collect() if "made_up" in each.name]
    assert families and sum(len(each.samples) for each in families) <= MAX_UNDESCRIBED_SERIES
