"""Counters and loads of the engine and its workers, read at each scrape.

What the engine counts is this proxy's. What workers and stores report is the same at every proxy that they serve, so it
has a collector of its own. Counters of workers come with their heartbeats. Sums over workers never fall when one
leaves; what has a worker as its label is there only while the worker is, so that labels stay bounded.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.node.counters import DRAFT_SOURCES, MOST_DRAFTS, MetricInfo
from baton.proxy.interface import Engine, WorkerStatus
from baton.proxy.metrics.counters import (
    ENGINE_COUNTERS,
    PROMPT_SOURCES,
    STORE_COUNTERS,
    WORKER_COUNTERS,
)
from baton.proxy.scaling.objectives import RoleScale
from baton.proxy.tenants.tenants import Tenant
from baton.proxy.tenants.usage import REJECTED

_LABEL = ("model_name",)
_WORKER = ("worker", "role")
_UNDESCRIBED = MetricInfo("As last reported.")
MAX_UNDESCRIBED = 128
"""Counters that have no description; a store's misses by reason are a dozen. More of them are not shown."""
MAX_UNDESCRIBED_SERIES = 1 << 15
"""Of those counters, one for each member: 128 of 256 members. Of more members fewer counters are shown."""
MAX_REMEMBERED = 4096
"""Workers whose last counts are kept while they are away."""
_COUNTER_NAME = re.compile("[a-z][a-z0-9_]{0,63}")
_Reports = Mapping[tuple[str, ...], Mapping[str, float]]
"""What workers count, by the values of their labels."""
_LOADS = {
    "running": "Requests that are running in the worker.",
    "waiting": "Requests that are waiting in the worker.",
    "waiting_tokens": "Tokens that are still to be computed.",
    "free_blocks": "KV blocks that can be allocated, cached ones included.",
    "total_blocks": "KV blocks of the worker's pool.",
}


class MovedBytes:
    """KV that moved between two workers, for pairs whose workers are both there."""

    def __init__(self) -> None:
        self._moved: defaultdict[tuple[str, str], float] = defaultdict(float)

    def add(self, prefill: str, decode: str, num_bytes: int) -> None:
        """Workers by their endpoint identities, `worker/incarnation`."""
        self._moved[_name_of(prefill), _name_of(decode)] += num_bytes

    def collect(self, alive: set[str]) -> Metric:
        family = CounterMetricFamily(
            "baton:transfer_bytes", "KV handed over from one worker to another.", labels=("prefill", "decode")
        )
        for pair in [pair for pair in self._moved if not alive.issuperset(pair)]:
            del self._moved[pair]
        for pair, num_bytes in self._moved.items():
            family.add_metric(pair, num_bytes)
        return family


class EngineCollector(Collector):
    """What this proxy's engine has counted, at the time of a scrape."""

    def __init__(self, engine: Engine, models: Sequence[str], moved: MovedBytes) -> None:
        self._engine = engine
        self._models = ",".join(models)
        self._moved = moved

    def describe(self) -> Iterable[Metric]:
        return ()  # names depend on the engine; defined so that registering does not collect

    def collect(self) -> Iterable[Metric]:
        yield self._moved.collect({worker.worker for worker in self._engine.worker_loads()})
        yield from _counters(self._engine.counters(), self._models)
        yield from _scales(self._engine.scales())
        yield _dispatched(self._engine.dispatched())


class TenantCollector(Collector):
    """What the tenants of a file have used, at the time of a scrape. One that the file drops goes from here too."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self._tenants = tenants

    def describe(self) -> Iterable[Metric]:
        return ()  # as above

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "baton:tenant_requests", "Requests of a tenant that its limits let in.", labels=("tenant",)
        )
        tokens = CounterMetricFamily(
            "baton:tenant_tokens", "Tokens of a tenant's requests that have ended.", labels=("tenant", "kind")
        )
        rejected = CounterMetricFamily(
            "baton:tenant_rejected", "Requests that a tenant's limit or share refused.", labels=("tenant", "reason")
        )
        for tenant in self._tenants:
            totals = tenant.usage.totals
            requests.add_metric((tenant.name,), totals.requests)
            tokens.add_metric((tenant.name, "prompt"), totals.prompt_tokens)
            tokens.add_metric((tenant.name, "answer"), totals.answer_tokens)
            for reason in REJECTED:
                rejected.add_metric((tenant.name, reason), totals.rejected[reason])
        return requests, tokens, rejected


class ReportCollector(Collector):
    """What workers and stores have reported, at the time of a scrape."""

    def __init__(self, engine: Engine, models: Sequence[str]) -> None:
        self._engine = engine
        self._models = tuple(models)
        self._totals: defaultdict[tuple[str, str], _Total] = defaultdict(_Total)
        """By model and counter."""

    def describe(self) -> Iterable[Metric]:
        return ()  # as above

    def collect(self) -> Iterable[Metric]:
        workers = self._engine.worker_loads()
        yield self._usage(workers)
        yield self._sum_of_preemptions(workers)
        yield _cache_config(workers)
        yield _revisions(workers)
        yield from self._prompts(workers)
        yield from self._drafts(workers)
        yield from _workers(workers)
        yield from _stores(workers)

    def _usage(self, workers: list[WorkerStatus]) -> Metric:
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Fraction of the decode workers' KV in use, 0 to 1.", labels=_LABEL
        )
        for model in self._models:
            decode = [worker.load for worker in _of(model, workers) if worker.role in ("decode", "mixed")]
            total = sum(load.total_blocks for load in decode)
            used = total - sum(load.free_blocks for load in decode)
            usage.add_metric((model,), used / total if total else 0.0)
        return usage

    def _sum_of_preemptions(self, workers: list[WorkerStatus]) -> Metric:
        family = CounterMetricFamily(
            "vllm:num_preemptions", "Sequences that were preempted: they gave up their KV.", labels=_LABEL
        )
        for model in self._models:
            family.add_metric((model,), self._total(model, "preemptions", workers))
        return family

    def _drafts(self, workers: list[WorkerStatus]) -> Iterable[Metric]:
        """Of speculation, under vLLM's names."""
        for name in ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"):
            family = CounterMetricFamily(f"vllm:{name}", WORKER_COUNTERS[name].help, labels=_LABEL)
            for model in self._models:
                family.add_metric((model,), self._total(model, name, workers))
            yield family
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that were accepted, by their number behind a sequence's last token.",
            labels=(*_LABEL, "position"),
        )
        sources = CounterMetricFamily(
            "baton:spec_decode_num_accepted_tokens",
            "Draft tokens that were accepted, by where they came from.",
            labels=(*_LABEL, "source"),
        )
        for model in self._models:
            for place in range(MOST_DRAFTS):
                count = self._total(model, f"spec_decode_accepted_at_{place}", workers)
                places.add_metric((model, str(place)), count)
            for source in DRAFT_SOURCES:
                sources.add_metric((model, source), self._total(model, f"spec_decode_accepted_{source}", workers))
        yield from (places, sources)

    def _total(self, model: str, name: str, workers: list[WorkerStatus]) -> float:
        return self._totals[model, name].observe(_of(model, workers), name)

    def _prompts(self, workers: list[WorkerStatus]) -> Iterable[Metric]:
        """By source; and as vLLM counts a cache outside of the engine: what the pool lacks is asked of it."""
        family = CounterMetricFamily(
            "baton:prompt_tokens",
            "Tokens of prompts by where their KV came from: a pool, a tier below it, or a step.",
            labels=(*_LABEL, "source"),
        )
        queries = CounterMetricFamily(
            "vllm:external_prefix_cache_queries", "Prompt tokens that were not in the worker's own pool.", labels=_LABEL
        )
        hits = CounterMetricFamily(
            "vllm:external_prefix_cache_hits",
            "Prompt tokens of these that came from a tier below the pool.",
            labels=_LABEL,
        )
        for model in self._models:
            tokens = {source: self._total(model, f"prompt_tokens_{source}", workers) for source in PROMPT_SOURCES}
            for source, count in tokens.items():
                family.add_metric((model, source), count)
            asked = sum(count for source, count in tokens.items() if source != "gpu")
            queries.add_metric((model,), asked)
            hits.add_metric((model,), asked - tokens["computed"])
        yield from (family, queries, hits)


class _Total:
    """A sum over workers' counters that never falls when a worker leaves or starts anew."""

    def __init__(self) -> None:
        self._value = 0.0
        self._last: dict[str, float] = {}  # those that were here longest ago first

    def observe(self, workers: list[WorkerStatus], name: str) -> float:
        now = {worker.worker: worker.load.counters.get(name, 0.0) for worker in workers}
        for worker, value in now.items():
            before = self._last.pop(worker, 0.0)
            self._value += value - before if value >= before else value
            self._last[worker] = value
        while len(self._last) > max(len(now), MAX_REMEMBERED):
            del self._last[next(iter(self._last))]
        return self._value


def _of(model: str, workers: list[WorkerStatus]) -> list[WorkerStatus]:
    return [worker for worker in workers if worker.model in (model, "")]


def _cache_config(workers: list[WorkerStatus]) -> Metric:
    labels = (*_LABEL, "engine", "role", "block_size", "num_gpu_blocks")
    family = GaugeMetricFamily("vllm:cache_config_info", "The KV pool of each worker; always 1.", labels=labels)
    for worker in workers:
        if worker.block_tokens:
            sizes = (str(worker.block_tokens), str(worker.load.total_blocks))
            family.add_metric((worker.model, worker.worker, worker.role, *sizes), 1.0)
    return family


def _revisions(workers: list[WorkerStatus]) -> Metric:
    labels = (*_LABEL, "revision", "role", "state")
    family = GaugeMetricFamily("baton:revision_workers", "Registered workers of each revision.", labels=labels)
    counts = Counter((each.model, each.revision, each.role, each.state) for each in workers if each.role != "store")
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def _counters(counters: Mapping[str, float], model: str) -> Iterable[Metric]:
    for name, value in sorted(counters.items()):
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        text = ENGINE_COUNTERS.get(name, "Counted by the proxy's engine.")
        family = kind(f"baton:{name}", text, labels=_LABEL)
        family.add_metric((model,), value)
        yield family


def _dispatched(dispatched: Mapping[str, Mapping[str, int]]) -> Metric:
    family = CounterMetricFamily(
        "baton:revision_requests",
        "Attempts that went to workers of the revision (--revision of the workers).",
        labels=(*_LABEL, "revision"),
    )
    for model, revisions in dispatched.items():
        for revision, count in revisions.items():
            family.add_metric((model, revision), count)
    return family


def _scales(scales: Mapping[str, Sequence[RoleScale]]) -> Iterable[Metric]:
    desired = GaugeMetricFamily(
        "baton:desired_replicas",
        "Workers of the role that the objectives ask for; an autoscaler keeps it between its bounds.",
        labels=(*_LABEL, "role"),
    )
    saturation = GaugeMetricFamily(
        "baton:slo_saturation",
        "90th percentile of the latency that the role answers for (prefill TTFT; decode TPOT, and TTFT where there is "
        "no prefill worker) by its objective, at most 2, as a mean of 45 s; above 1 the objective is missed.",
        labels=(*_LABEL, "role"),
    )
    for model, roles in scales.items():
        for scale in roles:
            desired.add_metric((model, scale.role), scale.desired)
            saturation.add_metric((model, scale.role), scale.saturation)
    return desired, saturation


def _workers(workers: list[WorkerStatus]) -> Iterable[Metric]:
    yield _members(workers)
    up = GaugeMetricFamily("baton:worker_up", "A registered worker, by state.", labels=(*_WORKER, "state"))
    for worker in workers:
        up.add_metric((worker.worker, worker.role, worker.state), 1.0)
    yield up
    orphaned = GaugeMetricFamily(
        "baton:worker_orphaned", "1 while what started the worker is gone: it drains --orphan-s later.", labels=_WORKER
    )
    for worker in workers:
        orphaned.add_metric((worker.worker, worker.role), worker.orphaned)
    yield orphaned
    for name, text in _LOADS.items():
        gauge = GaugeMetricFamily(f"baton:worker_{name}", text, labels=_WORKER)
        for worker in workers:
            gauge.add_metric((worker.worker, worker.role), getattr(worker.load, name))
        yield gauge
    counting = [worker for worker in workers if worker.role != "store"]
    reports: _Reports = {
        (each.worker, each.role): {"steps": each.load.steps, **each.load.counters} for each in counting
    }
    yield from _reported("baton:worker_", reports, WORKER_COUNTERS, _WORKER)


def _stores(workers: list[WorkerStatus]) -> Iterable[Metric]:
    stores: _Reports = {(each.worker,): each.load.counters for each in workers if each.role == "store"}
    used = GaugeMetricFamily("baton:tier_used_bytes", "KV that the hosts' stores hold.", labels=("tier",))
    capacity = GaugeMetricFamily("baton:tier_capacity_bytes", "Capacity of the hosts' stores.", labels=("tier",))
    for tier in ("ram", "disk") if stores else ():
        used.add_metric((tier,), sum(each.get(f"{tier}_used_bytes", 0.0) for each in stores.values()))
        capacity.add_metric((tier,), sum(each.get(f"{tier}_size_bytes", 0.0) for each in stores.values()))
    yield used
    yield capacity
    yield from _reported("baton:store_", stores, STORE_COUNTERS, ("store",))


def _reported(
    prefix: str, reports: _Reports, known: Mapping[str, MetricInfo], labels: Sequence[str]
) -> Iterable[Metric]:
    """A family for each counter of heartbeats, described or not, as long as its name can be a metric's."""
    named = {name for report in reports.values() for name in report} - set(known)
    most = min(MAX_UNDESCRIBED, MAX_UNDESCRIBED_SERIES // max(1, len(reports)))
    undescribed = sorted(name for name in named if _COUNTER_NAME.fullmatch(name))[:most]
    for name in sorted([*known, *undescribed]):
        info = known.get(name, _UNDESCRIBED)
        kind = GaugeMetricFamily if info.is_gauge else CounterMetricFamily
        family = kind(f"{prefix}{name}", info.help, labels=labels)
        for values, report in reports.items():
            if name in report:
                family.add_metric(values, report[name])
        yield family


def _members(workers: list[WorkerStatus]) -> Metric:
    """There at 0 too, which an alert can see; a series that is missing fires nothing."""
    family = GaugeMetricFamily("baton:workers", "Registered workers.", labels=("role", "state"))
    for role, state in product(("prefill", "decode", "mixed"), ("ready", "draining")):
        count = sum(worker.role == role and worker.state == state for worker in workers)
        family.add_metric((role, state), count)
    return family


def _name_of(identity: str) -> str:
    return identity.rpartition("/")[0]
