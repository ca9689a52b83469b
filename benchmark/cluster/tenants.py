"""TTFT of a light tenant alone, and beside one at ten times its load: real processes, or simulated ones.

Real workers are paced: a step lasts a fixed time, whatever else runs on this machine, so that what is measured is the
order in which the proxy and the workers serve. `--simulate` takes the steps of a GPU from a profile. `--one-key` sends
the same requests without tenants. Both tenants are known before the measurement: the first request of each is not
counted. Prints a JSON line a round, then a table of medians.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import msgspec

from baton.benchmark.cluster.completions import CompletionClient, TimedRequest, random_ids
from baton.benchmark.cluster.running import running
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import machine_text
from baton.benchmark.harness.statistics import median_text, percentile
from baton.benchmark.load.table import markdown
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec
from baton.proxy.settings import ProxySettings
from baton.simulator.latency import load_profile
from baton.simulator.simulation import Scenario, simulate
from baton.simulator.workload import LengthSampler, SimRequest, poisson

LIGHT, HEAVY = "light", "heavy"
DECODE_PART = 0.25
"""Of the time of a prefill step."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request and its time to first token; None where it failed."""

    request: SimRequest
    ttft_s: float | None


class Side(Protocol):
    """A cluster, real or simulated."""

    def answers(self, requests: Sequence[SimRequest]) -> list[Answered]:
        """Each request is sent when it is due, whatever became of the others."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """Real schedulers on a simulated clock."""

    scenario: Scenario

    def answers(self, requests: Sequence[SimRequest]) -> list[Answered]:
        records = simulate(self.scenario, requests).records
        return [Answered(record.request, record.ttft_s if record.ok else None) for record in records]


@dataclass(frozen=True, slots=True)
class Served:
    """A running cluster, with a client for each tenant."""

    clients: Mapping[str, CompletionClient]

    def answers(self, requests: Sequence[SimRequest]) -> list[Answered]:
        """The tenants' clients have a thread each."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            parts = pool.map(
                lambda name: self._send(self.clients[name], [each for each in requests if each.tenant == name]),
                self.clients,
            )
            return [answered for part in parts for answered in part]

    @staticmethod
    def _send(client: CompletionClient, requests: Sequence[SimRequest]) -> list[Answered]:
        timed = [
            TimedRequest(
                each.arrival_s,
                random_ids(each.prompt_tokens, each.tenant, each.number, each.arrival_s),
                each.output_tokens,
                {},
            )
            for each in requests
        ]
        if not timed:
            return []
        streams = client.when_due(timed)
        return [Answered(request, s.ttft_s if s.ok else None) for request, s in zip(requests, streams, strict=True)]


def workload(options: argparse.Namespace, seed: int) -> tuple[list[SimRequest], list[SimRequest]]:
    """The light tenant's requests, and those of both, in order of arrival; numbers are places in the list."""
    answer, heavy_prompt = LengthSampler(options.max_tokens), options.heavy_prompt_tokens or options.prompt_tokens
    light = _of(LIGHT, options.rate, LengthSampler(options.prompt_tokens), answer, options.seconds, 2 * seed)
    heavy_rate = options.rate * options.factor
    heavy = _of(HEAVY, heavy_rate, LengthSampler(heavy_prompt), answer, options.seconds, 2 * seed + 1)
    return _numbered(light), _numbered([*light, *heavy])


def _of(
    tenant: str, rate: float, prompt: LengthSampler, answer: LengthSampler, seconds: float, seed: int
) -> list[SimRequest]:
    """A request at once, which makes the tenant known; then as many as come within the time."""
    requests = poisson(1 + max(1, round(rate * seconds)), rate, prompt, answer, seed)
    begin = requests[0].arrival_s
    return [replace(each, arrival_s=each.arrival_s - begin, tenant=tenant) for each in requests]


def _numbered(requests: Sequence[SimRequest]) -> list[SimRequest]:
    """Each has a prompt of its own."""
    ordered = sorted(requests, key=lambda each: each.arrival_s)
    return [replace(each, number=number, prefix=(number,)) for number, each in enumerate(ordered)]


def ttft_ms(answers: Sequence[Answered], tenant: str) -> tuple[float, float]:
    """p50 and p99 of a tenant's requests but the first. Raises BenchmarkFailed where none was answered."""
    found = [1e3 * each.ttft_s for each in answers if _counts(each, tenant) and each.ttft_s is not None]
    if not found:
        raise BenchmarkFailed(f"no request of the {tenant} tenant was answered")
    return percentile(found, 50), percentile(found, 99)


def _counts(answered: Answered, tenant: str) -> bool:
    return answered.request.tenant == tenant and answered.request.arrival_s > 0.0


def compare(alone: Sequence[Answered], beside: Sequence[Answered]) -> dict[str, float]:
    """One round's figures: the light tenant alone and beside the heavy one."""
    (alone_p50, alone_p99), (p50, p99), (heavy_p50, heavy_p99) = (
        ttft_ms(alone, LIGHT),
        ttft_ms(beside, LIGHT),
        ttft_ms(beside, HEAVY),
    )
    return {
        "alone_p50_ms": alone_p50,
        "alone_p99_ms": alone_p99,
        "beside_p50_ms": p50,
        "beside_p99_ms": p99,
        "p50_ratio": p50 / alone_p50,
        "p99_ratio": p99 / alone_p99,
        "heavy_p50_ms": heavy_p50,
        "heavy_p99_ms": heavy_p99,
        "light_requests": sum(_counts(each, LIGHT) for each in beside),
        "failed": sum(each.ttft_s is None for each in (*alone, *beside)),
    }


@contextmanager
def simulated(options: argparse.Namespace) -> Iterator[Side]:
    profile = load_profile(options.profile)
    rows = options.rows or profile.max_num_seqs
    proxy = ProxySettings(local_prefill="never", policy="least-loaded", max_queue=1 << 16, request_timeout_s=3600.0)
    profile = msgspec.structs.replace(profile, max_num_seqs=rows)
    side = Simulated(Scenario(profile=profile, prefill=1, decode=1, proxy=proxy))
    yield _WithoutTenants(side) if options.one_key else side


@dataclass(frozen=True, slots=True)
class _WithoutTenants:
    """The same requests, which the cluster takes for those of one tenant."""

    side: Simulated

    def answers(self, requests: Sequence[SimRequest]) -> list[Answered]:
        found = self.side.answers([replace(each, tenant="") for each in requests])
        return [Answered(requests[each.request.number], each.ttft_s) for each in found]


@contextmanager
def served(options: argparse.Namespace) -> Iterator[Side]:
    rows = (f"--max-num-seqs={options.rows}",) if options.rows else ()
    with TemporaryDirectory() as folder:
        settings = ServeSettings(
            device="cpu",
            store_ram_gib=0.0,
            tenants=None if options.one_key else _tenants_file(Path(folder)),
            api_key=(LIGHT,) if options.one_key else (),
            proxy_arg=("--local-prefill=never", "--max-queue=65536"),
            worker_arg=rows,
        )
        keys = {name: LIGHT if options.one_key else name for name in (LIGHT, HEAVY)}
        with running(settings, edit=_paced(options.step_s)) as (cluster, _):
            yield Served({name: CompletionClient(cluster.url, cluster.model, key) for name, key in keys.items()})


def _tenants_file(folder: Path) -> Path:
    """Each tenant's key is its name."""
    path = folder / "tenants.toml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in (LIGHT, HEAVY)}
    path.write_text("".join(f'[{name}]\nkeys_sha256 = ["{digest}"]\n' for name, digest in digests.items()))
    return path


def _paced(step_s: float) -> Callable[[ChildSpec], ChildSpec]:
    def edit(spec: ChildSpec) -> ChildSpec:
        if spec.group not in ("prefill", "decode"):
            return spec
        own_s = step_s if spec.group == "prefill" else DECODE_PART * step_s
        return replace(
            spec, argv=(*spec.argv[:3], "baton.testing.paced_worker", spec.group, str(own_s), *spec.argv[4:])
        )

    return edit


def report(rounds: Sequence[Mapping[str, float]]) -> str:
    def median(name: str) -> str:
        return f"{statistics.median(each[name] for each in rounds):.0f}"

    table = [
        [
            percent,
            median(f"alone_{percent}_ms"),
            median(f"beside_{percent}_ms"),
            median_text([each[f"{percent}_ratio"] for each in rounds]),
            median(f"heavy_{percent}_ms"),
        ]
        for percent in ("p50", "p99")
    ]
    return markdown(("TTFT, ms", "light, alone", "light, beside", "beside / alone (range)", "heavy"), table)


def main(argv: Sequence[str]) -> int:
    parser = new_parser("tenants", __doc__)
    add = parser.add_argument
    add("--rate", type=float, default=1.0, help="requests a second of the light tenant")
    add("--factor", type=float, default=10.0, help="times as many of the heavy one")
    add("--seconds", type=float, default=30.0, help="length of a run")
    add("--prompt-tokens", type=int, default=512, help="tokens of a prompt")
    add("--heavy-prompt-tokens", type=int, default=0, help="tokens of the heavy tenant's prompts; 0: as many")
    add("--max-tokens", type=int, default=4, help="tokens of an answer")
    add("--rows", type=int, default=0, help="sequences that a worker runs at once; 0: its default")
    add("--rounds", type=int, default=3, help="runs, each with its own arrivals")
    add("--one-key", action="store_true", help="send all with one key: what there was without tenants")
    add("--step-s", type=float, default=0.2, help="time of a real prefill step")
    add("--simulate", action="store_true", help="simulate one prefill and one decode worker instead of running them")
    add("--profile", default="h200-llama-8b", help="of the simulated workers")
    options = parser.parse_args(argv)
    exit_on_sigterm()
    lines, rounds = JsonLines(options.output), []
    lines.begin(argv)
    with (simulated if options.simulate else served)(options) as side:
        for number in range(options.rounds):
            light, both = workload(options, number)
            rounds.append(compare(side.answers(light), side.answers(both)))
            lines.put("tenants", round=number, **rounds[-1])
    print(report(rounds))
    print("simulated" if options.simulate else machine_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
