"""The simulator against the real system on this machine's CPU: one workload, both sides, TTFT side by side.

    scripts/bench simulator [--prefill 1] [--decode 1] [--rate 6] [--rounds 5]

A round measures single steps (scripts/bench steps), sends requests one by one to the idle cluster, then a Poisson load,
then measures steps in several processes at once, since workers that share a machine slow each other down. The simulator
gets the latter, fitted, and of the idle cluster two numbers: what a first and what a later token take beyond their
step. It replays the load's own arrivals and lengths; nothing of the load's times is given to it. Prints a JSON line a
round, then a table of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from baton.benchmark.cluster.cpu import busy_s, cpu_s, free_port, server
from baton.benchmark.harness.options import new_parser
from baton.benchmark.load.meter import StreamMeter
from baton.node.http_client import HttpClient, Origin
from baton.proxy.settings import ProxySettings
from baton.simulator.fit import MeasuredStep, fit
from baton.simulator.latency import Profile, load_profile
from baton.simulator.record import RequestRecord, summarise
from baton.simulator.simulation import Scenario, simulate
from baton.simulator.workload import LengthSampler, SimRequest, poisson

VOCABULARY = range(100, 4000)
LONGEST = 480
REQUEST_TIMEOUT_S = 120.0
NUM_BLOCKS = 512
"""Of each worker's pool: small, so that all of its memory has been touched before the first round."""


class Client:
    """Open loop: each request is sent when it is due, whatever has become of the others."""

    def __init__(self, port: int, seed: int) -> None:
        self._origin = Origin.parse(f"http://127.0.0.1:{port}")
        self._random = random.Random(seed)

    def one_by_one(self, requests: Sequence[SimRequest]) -> list[RequestRecord]:
        async def run(http: HttpClient) -> list[RequestRecord]:
            return [await self._send(http, request, time.perf_counter()) for request in requests]

        return asyncio.run(self._with_client(run))

    def load(self, requests: Sequence[SimRequest]) -> list[RequestRecord]:
        async def run(http: HttpClient) -> list[RequestRecord]:
            begin = time.perf_counter() + 0.5
            return list(await asyncio.gather(*(self._when_due(http, request, begin) for request in requests)))

        return asyncio.run(self._with_client(run))

    async def _with_client(self, run: Any) -> list[RequestRecord]:
        http = HttpClient(self._origin, {}, time.perf_counter)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S * 2):
                return await run(http)
        finally:
            http.close()

    async def _when_due(self, http: HttpClient, request: SimRequest, begin: float) -> RequestRecord:
        due = begin + request.arrival_s
        await asyncio.sleep(due - time.perf_counter())
        return await self._send(http, request, due)

    async def _send(self, http: HttpClient, request: SimRequest, due: float) -> RequestRecord:
        """The record's times are relative: its request arrives at its own arrival time."""
        body = {
            "model": "demo",
            "prompt": [self._random.choice(VOCABULARY) for _ in range(request.prompt_tokens)],
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        meter = StreamMeter(keep_text=False)

        def sink(data: bytes, now: float) -> bool:
            meter.feed(data, now)
            return True

        status = await http.exchange(http.request("POST", "/v1/completions", json.dumps(body).encode()), sink)
        if status != 200 or meter.error or meter.first_s is None:
            return RequestRecord(request, error=f"HTTP {status} {meter.error}")
        first = meter.first_s - due + request.arrival_s
        gap = (meter.last_s - meter.first_s) / max(1, request.output_tokens - 1)
        return RequestRecord(request, [first + gap * number for number in range(request.output_tokens)])


def measured_steps(repeat: int, processes: int) -> list[MeasuredStep]:
    """Of so many processes at once, each with one thread, as workers are."""
    command = [sys.executable, "-P", "-m", "baton.benchmark.host.steps", "--repeat", str(repeat)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    if any(process.returncode for process in running):
        raise SystemExit("scripts/bench steps failed")
    return [msgspec.json.decode(line, type=MeasuredStep) for line in lines]


def with_steps(profile: Profile, steps: Sequence[MeasuredStep]) -> Profile:
    """`profile` with the coefficients that these steps have."""
    costs = {kind: fit([step for step in steps if step.kind == kind]).cost for kind in ("prefill", "decode")}
    return msgspec.structs.replace(profile, **costs)


def with_loops(profile: Profile, quiet: Profile, alone: Sequence[RequestRecord]) -> Profile:
    """`profile` with what a worker's loop adds to a step: what idle workers took beyond `quiet` steps and messages."""
    known = quiet.request_s + quiet.stream_s + 2 * quiet.message_s
    first = statistics.median(record.ttft_s - known - _step_s(quiet, record) for record in alone)
    later = statistics.median(record.tpot_s - quiet.decode.seconds(_context(record), 1) for record in alone)
    return msgspec.structs.replace(
        profile,
        prefill=msgspec.structs.replace(profile.prefill, a=profile.prefill.a + max(0.0, first)),
        decode=msgspec.structs.replace(profile.decode, a=profile.decode.a + max(0.0, later)),
    )


def _step_s(profile: Profile, record: RequestRecord) -> float:
    return profile.prefill.seconds(record.request.prompt_tokens, record.request.prompt_tokens**2)


def _context(record: RequestRecord) -> float:
    """Mean over its decode steps."""
    return record.request.prompt_tokens + record.request.output_tokens / 2


@dataclass(frozen=True, slots=True)
class Bench:
    client: Client
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
        alone = self.client.one_by_one(poisson(options.alone, 1.0, *lengths, seed=1000 + number))
        requests = poisson(options.requests, options.rate, *lengths, seed=number)
        busy_before, ours_before, begin = busy_s(), cpu_s((*self.served, os.getpid())), time.perf_counter()
        real = self.client.load(requests)
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
    lines = [
        f"| {'TTFT':5} | {'real, ms (median of rounds)':28} | {'simulated, ms':14} | {'simulated / real (range)':26} |",
        f"|{'-' * 7}|{'-' * 30}|{'-' * 16}|{'-' * 28}|",
    ]
    for name in ("mean", "p50", "p99"):
        real = [row[f"real_{name}_ms"] for row in rows]
        simulated = [row[f"simulated_{name}_ms"] for row in rows]
        ratios = [s / r for s, r in zip(simulated, real, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        lines.append(
            f"| {name:5} | {statistics.median(real):28.1f} | {statistics.median(simulated):14.1f} | {spread:26} |"
        )
    others = statistics.median(row["other_cores"] for row in rows)
    lines.append(
        f"{options.prefill}P{options.decode}D, {options.rate} requests/s, {len(rows)} rounds of {options.requests}; "
        f"{platform.machine()}, {os.cpu_count()} cores, of which others used {others:.2f} (median); "
        f"{time.strftime('%Y-%m-%d')}"
    )
    return "\n".join(lines)


def processes_of(parent: int) -> tuple[int, ...]:
    """The process ids of all its children."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{parent}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:  # it is gone
            continue
    return tuple(found)


def main(argv: Sequence[str]) -> int:
    parser = new_parser("simulator", __doc__)
    parser.add_argument("--profile", default="cpu-demo", help="what is not measured here is taken from this one")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=120, help="requests of the load, in a round")
    parser.add_argument("--alone", type=int, default=12, help="requests to the idle cluster, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=2, help="times that each step is measured, twice a round")
    parser.add_argument("--prompt-tokens", type=int, default=160, help="mean")
    parser.add_argument("--prompt-spread", type=float, default=0.6, help="standard deviation of its logarithm")
    parser.add_argument("--output-tokens", type=int, default=12)
    options = parser.parse_args(argv)
    port, rows = free_port(), []
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    more = [f"--prefill={options.prefill}", f"--decode={options.decode}", "--local-prefill=never"]
    more += ["--store-ram-gib=0", f"--worker-arg=--num-blocks={NUM_BLOCKS}", "--proxy-arg=--policy=least-loaded"]
    with server(environment, "demo", port, more) as supervisor:
        bench = Bench(Client(port, seed=0), options, processes_of(supervisor))
        fill = options.prefill * NUM_BLOCKS * 16 // 400
        bench.client.one_by_one(poisson(fill, 1.0, LengthSampler(450), LengthSampler(10), seed=99))
        for number in range(options.rounds):
            rows.append(bench.round(number))
            print(json.dumps({key: round(value, 3) for key, value in rows[-1].items()}), flush=True)
    print(report(rows, options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
