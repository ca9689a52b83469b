"""The simulator against the real system on this machine's CPU: one workload, both sides, TTFT side by side.

A round measures single steps (host/steps.py), sends requests one by one to the idle cluster, then a Poisson load,
then measures steps in several processes at once, since workers that share a machine slow each other down. The simulator
gets the latter, fitted, and of the idle cluster what a first token takes beyond its step, a constant and a share of the
step, and what a later one does, a constant. It replays the load's own arrivals and lengths; nothing of the load's times
is given to it. Prints a JSON line a round, then a table of medians.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from baton.benchmark.cluster.completions import CompletionClient, Streamed, TimedRequest
from baton.benchmark.cluster.running import running
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import busy_s, child_environment, cpu_s, machine_text, program
from baton.benchmark.harness.statistics import median_text
from baton.benchmark.load.table import markdown
from baton.launch.local import ServeSettings
from baton.proxy.settings import ProxySettings
from baton.simulator.fit import MeasuredStep, fit
from baton.simulator.latency import Profile, load_profile
from baton.simulator.record import RequestRecord, summarise
from baton.simulator.simulation import Scenario, simulate
from baton.simulator.workload import LengthSampler, SimRequest, poisson

VOCABULARY = range(100, 4000)
LONGEST = 480
NUM_BLOCKS = 512
"""Of each worker's pool: small, so that all of its memory has been touched before the first round."""
FILL_TOKENS = 400
"""Of each request that fills the pools, at least."""


class RealSide:
    """The real cluster: sends it a workload of the simulator, and makes the simulator's records of the answers."""

    def __init__(self, client: CompletionClient, seed: int) -> None:
        self._client = client
        self._random = random.Random(seed)

    def one_by_one(self, requests: Sequence[SimRequest]) -> list[RequestRecord]:
        answers = self._client.in_turn([(self._prompt(request), request.output_tokens) for request in requests])
        return list(map(_record, requests, answers))

    def load(self, requests: Sequence[SimRequest]) -> list[RequestRecord]:
        """Each is sent when it is due, whatever became of the others."""
        timed = [TimedRequest(each.arrival_s, self._prompt(each), each.output_tokens, {}) for each in requests]
        return list(map(_record, requests, self._client.when_due(timed)))

    def _prompt(self, request: SimRequest) -> list[int]:
        return [self._random.choice(VOCABULARY) for _ in range(request.prompt_tokens)]


def _record(request: SimRequest, answer: Streamed) -> RequestRecord:
    """Its times are relative: its request arrives at its own arrival time."""
    if not answer.ok:
        return RequestRecord(request, error=answer.outcome.error)
    first = answer.ttft_s + request.arrival_s
    gap = sum(answer.outcome.gaps_s) / max(1, request.output_tokens - 1)
    return RequestRecord(request, [first + gap * number for number in range(request.output_tokens)])


def measured_steps(repeat: int, processes: int) -> list[MeasuredStep]:
    """Of so many processes at once, each with one thread, as workers are."""
    command, environment = program("steps", "--repeat", str(repeat)), child_environment(OMP_NUM_THREADS="1")
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    if any(process.returncode for process in running):
        raise BenchmarkFailed("baton bench steps failed")
    return [msgspec.json.decode(line, type=MeasuredStep) for line in lines]


def with_steps(profile: Profile, steps: Sequence[MeasuredStep]) -> Profile:
    """`profile` with the coefficients that these steps have."""
    costs = {kind: fit([step for step in steps if step.kind == kind]).cost for kind in ("prefill", "decode")}
    return msgspec.structs.replace(profile, **costs)


def with_loops(profile: Profile, quiet: Profile, alone: Sequence[RequestRecord]) -> Profile:
    """`profile` with what a worker's loop adds to a step: what idle workers took beyond `quiet` steps and messages."""
    known = quiet.request_s + quiet.stream_s + 2 * quiet.message_s
    steps = [_step_s(quiet, record) for record in alone]
    first, share = line([(step, record.ttft_s - known - step) for step, record in zip(steps, alone, strict=True)])
    later = statistics.median(record.tpot_s - quiet.decode.seconds(_context(record), 1) for record in alone)
    cost, longer = profile.prefill, 1.0 + share
    return msgspec.structs.replace(
        profile,
        prefill=msgspec.structs.replace(cost, a=cost.a * longer + first, b=cost.b * longer, c=cost.c * longer),
        decode=msgspec.structs.replace(profile.decode, a=profile.decode.a + max(0.0, later)),
    )


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), neither negative, of the y = a + b x nearest to the points (x, y) by least squares. x is positive."""
    xs, ys = (statistics.fmean(numbers) for numbers in zip(*points, strict=True))
    spread = sum((x - xs) ** 2 for x, _ in points)
    slope = sum((x - xs) * (y - ys) for x, y in points) / spread if spread else 0.0
    if slope < 0.0:
        return max(0.0, ys), 0.0
    if ys - slope * xs < 0.0:
        return 0.0, max(0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points))
    return ys - slope * xs, slope


def _step_s(profile: Profile, record: RequestRecord) -> float:
    return profile.prefill.seconds(record.request.prompt_tokens, record.request.prompt_tokens**2)


def _context(record: RequestRecord) -> float:
    """Mean over its decode steps."""
    return record.request.prompt_tokens + record.request.output_tokens / 2


@dataclass(frozen=True, slots=True)
class SimulatorBenchmark:
    """What a round needs. `served` are the process ids of the cluster."""

    real: RealSide
    options: argparse.Namespace
    served: tuple[int, ...]

    @property
    def processes(self) -> int:
        """Workers slow each other down where they share caches, or a core: steps are measured side by side."""
        return min(os.cpu_count() or 1, self.options.prefill + self.options.decode)

    def round(self, number: int) -> dict[str, Any]:
        options = self.options
        lengths = (
            LengthSampler(options.prompt_tokens, options.prompt_spread, LONGEST),
            LengthSampler(options.output_tokens),
        )
        base = msgspec.structs.replace(load_profile(options.profile), num_blocks=NUM_BLOCKS)
        quiet = with_steps(base, measured_steps(options.repeat, 1))
        alone = self.real.one_by_one(poisson(options.alone, 1.0, *lengths, seed=1000 + number))
        requests = poisson(options.requests, options.rate, *lengths, seed=number)
        busy_before, ours_before, begin = busy_s(), cpu_s((*self.served, os.getpid())), time.perf_counter()
        real = self.real.load(requests)
        passed_s = time.perf_counter() - begin
        ours_s = cpu_s((*self.served, os.getpid())) - ours_before
        others = max(0.0, busy_s() - busy_before - ours_s) / passed_s
        profile = with_steps(quiet, measured_steps(options.repeat, self.processes))
        profile = with_loops(profile, quiet, alone)
        proxy = ProxySettings(local_prefill="never", policy="least-loaded")
        simulated = simulate(
            Scenario(profile=profile, prefill=options.prefill, decode=options.decode, proxy=proxy), requests
        )
        theirs, ours = summarise(real), summarise(simulated.records)
        return {
            "round": number,
            "failed": theirs.failed,
            **{f"real_{name}_ms": getattr(theirs.ttft, f"{name}_s") * 1e3 for name in ("mean", "p50", "p99")},
            **{f"simulated_{name}_ms": getattr(ours.ttft, f"{name}_s") * 1e3 for name in ("mean", "p50", "p99")},
            "real_tpot_ms": theirs.tpot.mean_s * 1e3,
            "simulated_tpot_ms": ours.tpot.mean_s * 1e3,
            "prefill_256_ms": profile.prefill.seconds(256, 256**2) * 1e3,
            "quiet_prefill_256_ms": quiet.prefill.seconds(256, 256**2) * 1e3,
            "decode_4_ms": profile.decode.seconds(4 * 256, 4) * 1e3,
            "our_cores": ours_s / passed_s,
            "other_cores": others,
        }


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    table = []
    for name in ("mean", "p50", "p99"):
        real = [row[f"real_{name}_ms"] for row in rows]
        simulated = [row[f"simulated_{name}_ms"] for row in rows]
        ratios = [s / r for s, r in zip(simulated, real, strict=True)]
        table.append(
            [name, f"{statistics.median(real):.1f}", f"{statistics.median(simulated):.1f}", median_text(ratios)]
        )
    head = ("TTFT", "real, ms (median of rounds)", "simulated, ms", "simulated / real (range)")
    others = statistics.median(row["other_cores"] for row in rows)
    return (
        f"{markdown(head, table)}\n"
        f"{options.prefill}P{options.decode}D, {options.rate} requests/s, {len(rows)} rounds of {options.requests}; "
        f"{machine_text()}, of which others used {others:.2f} (median)"
    )


def main(argv: Sequence[str]) -> int:
    parser = new_parser("simulator", __doc__)
    parser.add_argument("--profile", default="cpu-demo", help="what is not measured here is taken from this one")
    parser.add_argument("--prefill", type=int, default=1, help="prefill workers")
    parser.add_argument("--decode", type=int, default=1, help="decode workers")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=120, help="requests of the load, in a round")
    parser.add_argument("--alone", type=int, default=12, help="requests to the idle cluster, in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    parser.add_argument("--repeat", type=int, default=2, help="times that each step is measured, twice a round")
    parser.add_argument("--prompt-tokens", type=int, default=160, help="mean of the prompts' lengths")
    parser.add_argument("--prompt-spread", type=float, default=0.6, help="standard deviation of its logarithm")
    parser.add_argument("--output-tokens", type=int, default=12, help="of each request")
    options = parser.parse_args(argv)
    exit_on_sigterm()
    lines, rows = JsonLines(options.output), []
    settings = ServeSettings(
        prefill=options.prefill,
        decode=options.decode,
        device="cpu",
        local_prefill="never",
        store_ram_gib=0.0,
        worker_arg=(f"--num-blocks={NUM_BLOCKS}",),
        proxy_arg=("--policy=least-loaded",),
    )
    with running(settings, environ=child_environment(OMP_NUM_THREADS="1")) as (cluster, _):
        real = RealSide(CompletionClient(cluster.url, cluster.model), seed=0)
        benchmark = SimulatorBenchmark(real, options, tuple(map(cluster.pid, cluster.running())))
        fill = options.prefill * NUM_BLOCKS * 16 // FILL_TOKENS
        real.one_by_one(poisson(fill, 1.0, LengthSampler(450), LengthSampler(10), seed=99))
        for number in range(options.rounds):
            rows.append(benchmark.round(number))
            lines.write(**rows[-1])
    print(report(rows, options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
