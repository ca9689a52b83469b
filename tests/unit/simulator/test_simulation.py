"""simulator.simulation, small: every request gets exactly its tokens under faults, and a seed determines the run."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from baton.proxy.routing.roles import MixedRoles
from baton.proxy.routing.router import WorkerView
from baton.proxy.settings import ProxySettings
from baton.simulator.latency import load_profile
from baton.simulator.placement import Split, goodput, splits
from baton.simulator.record import Slo, summarise
from baton.simulator.simulation import Loss, Scenario, SimOutcome, simulate
from baton.simulator.workload import LengthSampler, SimRequest, gaps, poisson

ROOT = Path(__file__).resolve().parents[3]
PROFILE = msgspec.structs.replace(load_profile("h200-llama-8b"), num_blocks=600, max_num_seqs=24)
LOAD = poisson(60, 12.0, LengthSampler(3000, 0.7, 20_000), LengthSampler(60, 0.6, 400), seed=5)


def _scenario(prefill: int = 2, decode: int = 2, **proxy: object) -> Scenario:
    settings = ProxySettings(**{"local_prefill": "never", "policy": "least-loaded", **proxy})  # type: ignore[arg-type]
    return Scenario(profile=PROFILE, prefill=prefill, decode=decode, proxy=settings)


def _fingerprint(outcome: SimOutcome) -> str:
    """A digest of all token times of all clients."""
    times = [(record.request.number, record.token_s, record.error) for record in outcome.records]
    return hashlib.sha256(repr(times).encode()).hexdigest()


def _served(outcome: SimOutcome, requests: list[SimRequest]) -> None:
    """Check that all requests completed; the client asserts each token's value and position."""
    assert [record.error for record in outcome.records] == [""] * len(requests)
    assert [len(record.token_s) for record in outcome.records] == [request.output_tokens for request in requests]
    for record in outcome.records:
        assert record.token_s == sorted(record.token_s) and record.ttft_s > 0


def test_every_request_gets_its_tokens_at_plausible_times() -> None:
    """Guards against a lost request, and against one that is faster than its own steps."""
    outcome = simulate(_scenario(), LOAD)
    _served(outcome, LOAD)
    for record in outcome.records:
        alone = PROFILE.prefill.seconds(record.request.prompt_tokens, record.request.prompt_tokens**2)
        assert record.ttft_s >= alone + PROFILE.request_s + PROFILE.stream_s
        assert all(gap >= PROFILE.decode.a for gap in gaps(record.token_s[1:]))
    assert outcome.counters["routed_disaggregated_total"] == len(LOAD)
    assert outcome.moved_bytes > 0


@pytest.mark.parametrize(("prefill", "local"), [(0, "always"), (2, "never"), (2, "auto")])
def test_fast_forwarding_changes_no_time(prefill: int, local: str) -> None:
    """Guards fast-forwarding: token times equal those of step-by-step simulation, also when workers die."""
    losses = (Loss(1.1, "d1"), *([Loss(2.3, "p0")] if prefill else []))
    scenario = replace(_scenario(prefill, 3, local_prefill=local), losses=losses)
    quick, slow = simulate(scenario, LOAD), simulate(replace(scenario, ahead=False), LOAD)
    _served(quick, LOAD)
    assert quick.counters["retries_total"] > 0
    assert [record.token_s for record in quick.records] == [record.token_s for record in slow.records]
    names = [name for name in quick.counters if not name.startswith("kv_event")]  # events wait for the I/O thread
    assert [quick.counters[name] for name in names] == [slow.counters[name] for name in names]
    assert quick.messages < slow.messages


def test_decode_workers_prefill_locally_where_prompts_wait() -> None:
    """Guards `auto`: with too few prefill workers it lowers TTFT by prefilling some prompts locally."""
    alone, helped = (simulate(_scenario(1, 3, local_prefill=mode), LOAD) for mode in ("never", "auto"))
    _served(helped, LOAD)
    assert 0 < helped.counters["routed_local_sooner_total"] < len(LOAD) / 2
    assert summarise(helped.records).ttft.p99_s < summarise(alone.records).ttft.p99_s / 2


def test_a_small_pool_preempts_and_serves_all() -> None:
    """Guards refusal, preemption and recompute by the real block manager, without leaked blocks."""
    tight = msgspec.structs.replace(PROFILE, num_blocks=340)
    outcome = simulate(replace(_scenario(2, 1), profile=tight), LOAD)
    _served(outcome, LOAD)
    assert summarise(outcome.records).ttft.p99_s > summarise(simulate(_scenario(), LOAD).records).ttft.p99_s


def test_shared_prefixes_are_not_computed_twice() -> None:
    """Guards prefix hits in a replay: KV events lead the router to the one worker of three with the prefix."""
    prompts = [SimRequest(n, 2.0 * n, 5000, 8, tuple(range(10))) for n in range(5)]
    outcome = simulate(_scenario(3, 2, policy="kv-aware"), prompts)
    _served(outcome, prompts)
    assert [record.cached_tokens for record in outcome.records] == [0, *[4992] * 4]
    assert outcome.records[1].ttft_s < outcome.records[0].ttft_s / 3


def test_overload_is_refused_and_no_request_is_lost() -> None:
    """Guards termination: every request is served or refused with the proxy's own error."""
    scenario = replace(_scenario(1, 1, max_queue=3), profile=msgspec.structs.replace(PROFILE, max_num_seqs=2))
    outcome = simulate(scenario, LOAD)
    failed = [record for record in outcome.records if not record.ok]
    assert failed and all(record.error.startswith("Overloaded") for record in failed)
    assert outcome.counters["rejected_queue_full_total"] == len(failed)
    assert all(len(record.token_s) == record.request.output_tokens for record in outcome.records if record.ok)


def test_a_lost_role_fails_its_requests() -> None:
    """Guards against a run that never ends when no worker can serve."""
    outcome = simulate(replace(_scenario(1, 1), losses=(Loss(1.0, "d0"),)), LOAD)
    assert any(record.error.startswith("PeerLost") for record in outcome.records)
    assert any(record.ok for record in outcome.records)


def test_a_seed_determines_the_run_for_any_hash_seed() -> None:
    """Guards determinism: hash seeds, and so the order of sets, differ in the two processes."""
    code = (
        "from dataclasses import replace; from baton.tests.unit.simulator import test_simulation as t; "
        "s = replace(t._scenario(2, 3, policy='kv-aware'), losses=(t.Loss(1.1, 'd1'),)); "
        "print(t._fingerprint(t.simulate(s, t.LOAD)))"
    )
    prints = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        prints.append(out.stdout)
    assert prints[0] == prints[1] and len(prints[0]) > 60


def test_goodput_is_between_too_little_and_too_much() -> None:
    """Guards the bisection: the returned rate meets the SLO, and the next higher step does not."""
    assert [split.name for split in splits(3, [512])] == [
        "3 adaptive",
        "1P2D",
        "2P1D",
        "3 colocated, chunks of 512",
    ]

    def workload(rate: float) -> list[SimRequest]:
        return poisson(40, rate, LengthSampler(4000), LengthSampler(30), seed=1)

    slo = Slo(0.4, 0.02)
    found = goodput(_scenario(1, 1), Split(1, 1), workload, slo, math.inf, first_rate=1.0, rounds=2)
    assert found.attained >= 0.9 and found.rate > 1.0
    assert found.rate_per_gpu == found.rate / 2
    impossible = goodput(_scenario(1, 1), Split(1, 1), workload, Slo(0.001, 0.02), math.inf, first_rate=1.0, rounds=1)
    assert impossible.rate == 0.0
    bounded = goodput(_scenario(1, 1), Split(1, 1), workload, slo, found.rate, first_rate=found.rate, rounds=2)
    assert (bounded.rate, bounded.runs) == (found.rate, 1), "nothing is tried above the bound"


def test_a_light_tenant_beside_a_heavy_one() -> None:
    """Guards the aim of fair admission, in simulated time: beside ten times its load, and more than workers can do, a
    light tenant's first tokens take at most twice as long as alone, while the heavy one's wait for seconds."""
    prompts, answers = LengthSampler(2048), LengthSampler(16)
    light = [replace(request, tenant="light") for request in poisson(20, 3.0, prompts, answers, seed=1)]
    heavy = [replace(request, tenant="heavy") for request in poisson(200, 30.0, prompts, answers, seed=2)]
    both = sorted([*light, *heavy], key=lambda request: request.arrival_s)
    together = [replace(request, number=number, prefix=(number,)) for number, request in enumerate(both)]
    alone, beside = simulate(_scenario(1, 1), light), simulate(_scenario(1, 1), together)
    _served(beside, together)
    of = {tenant: [r for r in beside.records if r.request.tenant == tenant] for tenant in ("light", "heavy")}
    before, after = summarise(alone.records).ttft, summarise(of["light"]).ttft
    assert after.p50_s < 2 * before.p50_s and after.p99_s < 2 * before.p99_s, (before, after)
    assert summarise(of["heavy"]).ttft.p99_s > 10 * after.p99_s


def test_a_light_tenant_beside_one_of_long_prompts() -> None:
    """Guards short prompts against waits for the whole of long ones (0.2 s each) that a worker computes already. Its
    first one, before which the heavy tenant was alone, is not counted."""
    light = [replace(each, tenant="light") for each in poisson(20, 3.0, LengthSampler(1024), LengthSampler(8), seed=1)]
    heavy = [replace(each, tenant="heavy") for each in poisson(40, 6.0, LengthSampler(8192), LengthSampler(8), seed=2)]
    both = sorted([*light, *heavy], key=lambda request: request.arrival_s)
    together = [replace(request, number=number, prefix=(number,)) for number, request in enumerate(both)]
    alone, beside = simulate(_scenario(1, 1), light), simulate(_scenario(1, 1), together)
    _served(beside, together)
    of = {tenant: [r for r in beside.records if r.request.tenant == tenant] for tenant in ("light", "heavy")}
    before, after = summarise(alone.records).ttft, summarise(of["light"][1:]).ttft
    assert after.p99_s < 2 * before.p99_s and after.p50_s < 2 * before.p50_s, (before, after)


def test_mixed_workers_change_sides_without_losing_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the change of a worker's share while it has prompts and answers, in both directions at once, with a pool
    that preempts and a worker that dies."""
    plans = [0, 2, 1, 2, 0, 1]

    def turn(roles: MixedRoles, view: Sequence[WorkerView], slack: object, answer_tokens: float, now: float) -> None:
        mixed = sorted(worker.identity for worker in view if worker.role == "mixed")
        number = int(now / 0.25)
        turned = mixed[number % 3 :] + mixed[: number % 3]
        roles.prompts = frozenset(turned[: min(plans[number % len(plans)], max(0, len(mixed) - 1))])

    monkeypatch.setattr(MixedRoles, "plan", turn)
    profile = msgspec.structs.replace(PROFILE, num_blocks=700)
    proxy = ProxySettings(policy="least-loaded")
    scenario = Scenario(profile=profile, mixed=3, proxy=proxy, losses=(Loss(2.0, "m1"),))
    outcome = simulate(scenario, LOAD)
    _served(outcome, LOAD)
    assert outcome.counters["routed_disaggregated_total"] > 10
    assert outcome.counters["routed_local_always_total"] > 5
