"""The routing policies on a slice of a Mooncake trace, each on a fresh cluster of the demo model on this machine.

A request of the trace becomes a prompt of token ids: equal block ids give equal tokens, lengths are divided by
`--shrink`, and arrivals are moved within the 3 s to which the trace rounds them, the same for all policies. What does
not fit into the model's context is left out, and counted. The trace names no users: for the policy `session` the
second block of a prompt (the first is the same for all) stands for the conversation.

Printed for each policy: prompt tokens that prefill found in its pools (hit rate), what an endless common cache would
give (ideal), the router's predictions where it makes any, and TTFT as the client sees it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from baton.benchmark.cluster.completions import CompletionClient, Streamed, TimedRequest, random_ids
from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.cluster.running import metrics, running
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import machine_text
from baton.benchmark.harness.statistics import percentile
from baton.benchmark.load.table import markdown
from baton.benchmark.load.traces import MOONCAKE_BLOCK_TOKENS, MOONCAKE_QUANTUM_S, TraceRequest, read_trace
from baton.launch.local import ServeSettings

POLICIES = ("round-robin", "least-loaded", "session", "kv-aware")
CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class ReplayedRequest:
    """One request of the slice. `due_s` counts from the start."""

    due_s: float
    ids: tuple[int, ...]
    max_tokens: int
    session: str

    def timed(self) -> TimedRequest:
        return TimedRequest(self.due_s, self.ids, self.max_tokens, {"prompt_cache_key": self.session})


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy in one round."""

    policy: str
    answers: tuple[Streamed, ...]
    failures: int
    seconds: float
    page: MetricsPage
    """Metrics at the end."""

    @property
    def hit_rate(self) -> float:
        return sum(a.cached_tokens for a in self.answers) / max(1, sum(a.prompt_tokens for a in self.answers))

    @property
    def ttft_ms(self) -> list[float]:
        return [1000 * answer.ttft_s for answer in self.answers]

    def hit_tokens(self, kind: str) -> float:
        """Tokens that the router predicted to be cached (`predicted`), or was wrong about (`missed`, `unforeseen`)."""
        return self.page.total(f"baton:kv_hit_{kind}_tokens_total")

    def values(self) -> dict[str, object]:
        return {
            "policy": self.policy,
            "hit_rate": self.hit_rate,
            **{f"{kind}_tokens": self.hit_tokens(kind) for kind in ("predicted", "missed", "unforeseen")},
            "ttft_mean_ms": statistics.mean(self.ttft_ms),
            "ttft_p50_ms": percentile(self.ttft_ms, 50),
            "ttft_p99_ms": percentile(self.ttft_ms, 99),
            "completed": len(self.answers),
            "failed": self.failures,
            **{name: self.page.total(f"baton:{name}_total") for name in ("busy", "retries", "worker_lost")},
            "seconds": self.seconds,
        }


# ---- the slice ----------------------------------------------------------------------------------------------------


def slice_of(trace: Sequence[TraceRequest], options: argparse.Namespace) -> tuple[list[ReplayedRequest], int]:
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


def _request(request: TraceRequest, at_s: float, options: argparse.Namespace) -> ReplayedRequest:
    block_tokens = MOONCAKE_BLOCK_TOKENS // options.shrink
    ids = [token for block in request.blocks for token in random_ids(block_tokens, options.seed, block)]
    length = max(1, request.input_tokens // options.shrink)
    session = request.blocks[min(1, len(request.blocks) - 1)]
    return ReplayedRequest(at_s, tuple(ids[:length]), max(1, request.output_tokens // options.shrink), str(session))


def ideal_hit_rate(requests: Sequence[ReplayedRequest], block_tokens: int) -> float:
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


def measure(policy: str, requests: Sequence[ReplayedRequest], options: argparse.Namespace) -> PolicyResult:
    """The requests on a fresh cluster, each at its time, whatever becomes of the others."""
    settings = ServeSettings(
        prefill=options.prefill,
        decode=options.decode,
        device="cpu",
        local_prefill="never",
        store_ram_gib=options.store_ram_gib,
        proxy_arg=(f"--policy={policy}",),
        worker_arg=(f"--num-blocks={options.num_blocks}", f"--block-tokens={options.block_tokens}"),
    )
    with running(settings) as (cluster, _):
        begin = time.perf_counter()
        client = CompletionClient(cluster.url, cluster.model)
        answers = client.when_due([request.timed() for request in requests])
        seconds = time.perf_counter() - begin
        good = tuple(answer for answer in answers if answer.ok)
        if not good:
            raise BenchmarkFailed(f"{policy}: all {len(answers)} requests failed: {answers[0].outcome.error}")
        return PolicyResult(policy, good, len(answers) - len(good), seconds, metrics(cluster))


def table(results: Sequence[PolicyResult], ideal: float) -> str:
    """Medians over the rounds; TTFT also as a part of round robin's in the same round."""
    head = (
        "policy",
        "hit rate",
        "of the ideal",
        "predicted but missed",
        "mean TTFT",
        "p99 TTFT",
        "mean / round robin's",
    )
    base = [statistics.mean(each.ttft_ms) for each in results if each.policy == POLICIES[0]]
    rows = []
    for policy in dict.fromkeys(result.policy for result in results):
        mine = [each for each in results if each.policy == policy]
        rate = statistics.median(each.hit_rate for each in mine)
        means = [statistics.mean(each.ttft_ms) for each in mine]
        p99 = statistics.median(percentile(each.ttft_ms, 99) for each in mine)
        predicted, missed = (sum(each.hit_tokens(kind) for each in mine) for kind in ("predicted", "missed"))
        ratio = f"{statistics.median(a / b for a, b in zip(means, base, strict=True)):.2f}" if base else ""
        rows.append(
            [
                policy,
                f"{100 * rate:.1f} %",
                f"{100 * rate / ideal:.0f} %",
                f"{100 * missed / max(1.0, predicted):.1f} %",
                f"{statistics.median(means):.0f} ms",
                f"{p99:.0f} ms",
                ratio,
            ]
        )
    return markdown(head, rows)


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    out = JsonLines(options.output)
    with options.trace.open(encoding="utf-8") as lines:
        requests, left_out = slice_of(read_trace(lines), options)
    ideal = ideal_hit_rate(requests, options.block_tokens)
    tokens = sum(len(request.ids) for request in requests)
    about = (
        f"{len(requests)} requests over {requests[-1].due_s:.0f} s, {left_out} left out; {tokens} prompt tokens, "
        f"ideal hit rate {100 * ideal:.1f} %; {options.prefill} prefill of {options.num_blocks} blocks, "
        f"{options.decode} decode"
    )
    print(about, flush=True)
    results = []
    for number in range(options.rounds):
        for policy in options.policy or POLICIES:
            results.append(measure(policy, requests, options))
            out.write(round=number, **results[-1].values())
    print(table(results, ideal))
    print(f"{machine_text()}; {options.rounds} round(s)")
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
