"""The routing policies on a slice of a Mooncake trace, each on a fresh cluster of the demo model on this machine.

    scripts/bench routing --trace conversation_trace.jsonl [--requests 1000] [--speed 2] [--rounds 1]

A request of the trace becomes a prompt of token ids: equal block ids give equal tokens, lengths are divided by
`--shrink`, and arrivals are moved within the 3 s to which the trace rounds them, the same for all policies. What does
not fit into the model's context is left out, and counted. The trace names no users: for the policy `session` the
second block of a prompt (the first is the same for all) stands for the conversation.

Printed for each policy: prompt tokens that prefill found in its pools (hit rate), what an endless common cache would
give (ideal), the router's predictions where it makes any, and TTFT as the client sees it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile

from baton.benchmark.harness.options import new_parser
from baton.benchmark.load.meter import StreamMeter
from baton.benchmark.load.traces import MOONCAKE_BLOCK_TOKENS, MOONCAKE_QUANTUM_S, TraceRequest, read_trace
from baton.node.http_client import HttpClient, HttpFailed, Origin

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("round-robin", "least-loaded", "session", "kv-aware")
FIRST_ID, LAST_ID = 300, 4000
"""Token ids that are plain text in the demo model's vocabulary."""
CONTEXT = 2048
START_TIMEOUT_S, STOP_TIMEOUT_S, REQUEST_TIMEOUT_S = 120.0, 60.0, 300.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the slice. `at_s` counts from the start."""

    at_s: float
    ids: tuple[int, ...]
    max_tokens: int
    session: str

    def body(self) -> bytes:
        fields = {"model": "demo", "prompt": self.ids, "max_tokens": self.max_tokens, "prompt_cache_key": self.session}
        more = {"stream": True, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
        return json.dumps(fields | more).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """One policy in one round."""

    policy: str
    answers: tuple[Answer, ...]
    failures: int
    seconds: float
    counters: dict[str, float]

    @property
    def hit_rate(self) -> float:
        return sum(a.cached_tokens for a in self.answers) / max(1, sum(a.prompt_tokens for a in self.answers))

    def ttft_ms(self, percent: float) -> float:
        ordered = sorted(answer.ttft_ms for answer in self.answers)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]

    def line(self) -> dict[str, object]:
        ttft = [answer.ttft_ms for answer in self.answers]
        predicted = self.counters.get("kv_hit_predicted_tokens", 0.0)
        missed, unforeseen = (self.counters.get(f"kv_hit_{kind}_tokens", 0.0) for kind in ("missed", "unforeseen"))
        return {
            "policy": self.policy,
            "hit_rate": round(self.hit_rate, 4),
            "predicted_tokens": predicted,
            "missed_tokens": missed,
            "unforeseen_tokens": unforeseen,
            "ttft_mean_ms": round(statistics.mean(ttft), 1),
            "ttft_p50_ms": round(self.ttft_ms(50), 1),
            "ttft_p99_ms": round(self.ttft_ms(99), 1),
            "completed": len(self.answers),
            "failed": self.failures,
            **{name: self.counters.get(name, 0.0) for name in ("busy", "retries", "worker_lost")},
            "seconds": round(self.seconds, 1),
        }


# ---- the slice ----------------------------------------------------------------------------------------------------


def slice_of(trace: Sequence[TraceRequest], options: argparse.Namespace) -> tuple[list[Request], int]:
    """The requests to send, and how many of the trace's were left out because they do not fit."""
    rng = random.Random(options.seed)
    fitting = [each for each in trace if _fits(each, options.shrink)]
    chosen = list(islice(fitting, options.skip, options.skip + options.requests))
    jittered = sorted((each.at_s + rng.random() * MOONCAKE_QUANTUM_S, place) for place, each in enumerate(chosen))
    begin_s = jittered[0][0]
    made = [_request(chosen[place], (at_s - begin_s) / options.speed, options) for at_s, place in jittered]
    left_out = sum(each.at_s <= chosen[-1].at_s and not _fits(each, options.shrink) for each in trace)
    return made, left_out


def _fits(request: TraceRequest, shrink: int) -> bool:
    return len(request.blocks) > 0 and (request.input_tokens + request.output_tokens) // shrink + 2 < CONTEXT


def _request(request: TraceRequest, at_s: float, options: argparse.Namespace) -> Request:
    block_tokens = MOONCAKE_BLOCK_TOKENS // options.shrink
    ids = [token for block in request.blocks for token in _tokens(block, block_tokens, options.seed)]
    length = max(1, request.input_tokens // options.shrink)
    session = request.blocks[min(1, len(request.blocks) - 1)]
    return Request(at_s, tuple(ids[:length]), max(1, request.output_tokens // options.shrink), str(session))


def _tokens(block: int, count: int, seed: int) -> list[int]:
    rng = random.Random(seed * 1_000_003 + block)
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


def ideal_hit_rate(requests: Sequence[Request], block_tokens: int) -> float:
    """With one cache that never forgets and knows a prompt from its arrival on; the last token is always computed."""
    seen: set[tuple[int, ...]] = set()
    hit = 0
    for request in requests:
        heads = [request.ids[:end] for end in range(block_tokens, len(request.ids), block_tokens)]
        held = next((place for place, head in enumerate(heads) if head not in seen), len(heads))
        hit += held * block_tokens
        seen.update(heads)
    return hit / sum(len(request.ids) for request in requests)


# ---- a run --------------------------------------------------------------------------------------------------------


@contextmanager
def cluster(policy: str, options: argparse.Namespace) -> Iterator[str]:
    """The URL of a fresh cluster, from the moment it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "baton.launch.serve", "--device", "cpu", "--port", str(port)]
    command += ["--prefill", str(options.prefill), "--decode", str(options.decode), "--local-prefill", "never"]
    command += ["--store-ram-gib", str(options.store_ram_gib), f"--proxy-arg=--policy={policy}"]
    command += [
        f"--worker-arg=--num-blocks={options.num_blocks}",
        f"--worker-arg=--block-tokens={options.block_tokens}",
    ]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _is_ready(f"http://127.0.0.1:{port}/health_generate"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the cluster is not ready:\n{log.read().decode(errors='replace')}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def counters_of(url: str) -> dict[str, float]:
    """The proxy's own counters, by name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^baton:(\w+?)(?:_total)?\{model_name=[^}]*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def replay(url: str, requests: Sequence[Request]) -> tuple[list[Answer], int]:
    """Send each at its time, whatever becomes of the others; returns the answers, and how many failed."""
    client = HttpClient(Origin.parse(url), {}, time.perf_counter)
    bodies = [client.request("POST", "/v1/completions", request.body()) for request in requests]
    begin = time.perf_counter() + 0.5

    async def one(request: Request, body: bytes) -> Answer | None:
        due = begin + request.at_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        meter = StreamMeter()

        def sink(data: bytes, now_s: float) -> bool:
            meter.feed(data, now_s)
            return True

        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                status = await client.exchange(body, sink)
        except (HttpFailed, TimeoutError):
            return None
        if status != 200 or meter.error or meter.first_s is None or meter.usage is None:
            return None
        details = meter.usage.prompt_tokens_details
        cached_tokens = details.cached_tokens if details is not None else None
        return Answer((meter.first_s - due) * 1000, meter.usage.prompt_tokens, cached_tokens or 0)

    answers = await asyncio.gather(*(one(*pair) for pair in zip(requests, bodies, strict=True)))
    client.close()
    good = [answer for answer in answers if answer is not None]
    return good, len(answers) - len(good)


def measure(policy: str, requests: Sequence[Request], options: argparse.Namespace) -> Result:
    with cluster(policy, options) as url:
        begin = time.perf_counter()
        answers, failures = asyncio.run(replay(url, requests))
        seconds = time.perf_counter() - begin
        if not answers:
            raise SystemExit(f"{policy}: all {failures} requests failed")
        return Result(policy, tuple(answers), failures, seconds, counters_of(url))


def table(results: Sequence[Result], ideal: float) -> str:
    """Medians over the rounds; TTFT also as a part of round robin's in the same round."""
    lines = [
        "| policy | hit rate | of the ideal | foreseen and not there | mean TTFT | p99 TTFT | mean / round robin's |",
        "|---|---|---|---|---|---|---|",
    ]
    base = [each for each in results if each.policy == POLICIES[0]]
    for policy in dict.fromkeys(result.policy for result in results):
        mine = [each for each in results if each.policy == policy]

        def median(values: list[float]) -> float:
            return statistics.median(values)

        rate = median([each.hit_rate for each in mine])
        means = [statistics.mean(answer.ttft_ms for answer in each.answers) for each in mine]
        p99 = median([each.ttft_ms(99) for each in mine])
        foreseen = sum(each.counters.get("kv_hit_predicted_tokens", 0.0) for each in mine)
        missed = sum(each.counters.get("kv_hit_missed_tokens", 0.0) for each in mine) / max(1.0, foreseen)
        theirs = [statistics.mean(answer.ttft_ms for answer in each.answers) for each in base]
        ratio = f"{median([a / b for a, b in zip(means, theirs, strict=False)]):.2f}" if theirs else ""
        lines.append(
            f"| {policy} | {100 * rate:.1f} % | {100 * rate / ideal:.0f} % | {100 * missed:.1f} % "
            f"| {median(means):.0f} ms | {p99:.0f} ms | {ratio} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    with options.trace.open(encoding="utf-8") as lines:
        requests, left_out = slice_of(read_trace(lines), options)
    ideal = ideal_hit_rate(requests, options.block_tokens)
    tokens = sum(len(request.ids) for request in requests)
    about = (
        f"{len(requests)} requests over {requests[-1].at_s:.0f} s, {left_out} left out; {tokens} prompt tokens, "
        f"ideal hit rate {100 * ideal:.1f} %; {options.prefill} prefill of {options.num_blocks} blocks, "
        f"{options.decode} decode"
    )
    print(about, flush=True)
    results = []
    for number in range(options.rounds):
        for policy in options.policy or POLICIES:
            results.append(measure(policy, requests, options))
            print(json.dumps({"round": number, **results[-1].line()}), flush=True)
    print(table(results, ideal))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}; {options.rounds} round(s)")
    return 1 if any(result.failures for result in results) else 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("routing", __doc__)
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake's conversation trace, as JSON lines")
    parser.add_argument("--requests", type=int, default=1000, help="requests of the slice")
    parser.add_argument("--skip", type=int, default=0, help="requests of the trace before the slice")
    parser.add_argument("--shrink", type=int, default=64, help="lengths are divided by this")
    parser.add_argument("--speed", type=float, default=2.0, help="the trace's time runs so many times faster")
    parser.add_argument("--seed", type=int, default=1, help="of tokens and jitter")
    parser.add_argument("--rounds", type=int, default=1, help="times that all policies run, in turns")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="may be repeated; default: all four")
    parser.add_argument("--prefill", type=int, default=2, help="prefill workers")
    parser.add_argument("--decode", type=int, default=2, help="decode workers")
    parser.add_argument("--num-blocks", type=int, default=4096, help="blocks of each worker's pool")
    parser.add_argument(
        "--block-tokens", type=int, default=8, help="size of a block of KV: a block of the trace, shrunk, by default"
    )
    parser.add_argument("--store-ram-gib", type=float, default=0.0, help="RAM of the KV store; 0: pools alone")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
