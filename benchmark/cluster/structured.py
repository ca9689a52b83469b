"""What answers of a given form cost: streams that are free, a fifth of them constrained, and all, in turns.

In the mix `bounded` all are constrained, and strings have a longest length.

One decode worker that computes its prompts too. JSON lines: `start` the server; `streams` a mix in a turn, with output
tokens/s and latencies at the client in ms; `first` the time to the first token, one request at a time, of free requests
and of requests with a schema that no request had before; at the end `ratio`, the best turn of each mix beside the best
of the free streams.

All streams have --output-tokens tokens: the schema asks for an array that is longer. With `--tokenizer FOLDER`, one of
the shape's family, the model has the whole vocabulary; else the demo model's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.benchmark.cluster.completions import CompletionClient, Streamed, TimedRequest, random_ids
from baton.benchmark.cluster.one_gpu import Configuration
from baton.benchmark.cluster.running import metrics, running, served_model
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import cluster_parser
from baton.benchmark.harness.statistics import percentile

COUNTERS = {
    "steps": "baton:worker_steps_total",
    "masked_steps": "baton:worker_masked_steps_total",
    "mask_s": "baton:worker_mask_seconds_total",
    "device_busy_s": "baton:worker_device_busy_seconds_total",
    "gap_s": "baton:worker_device_gap_seconds_total",
}
MIXES = {"free": (0, False), "fifth": (5, False), "all": (1, False), "bounded": (1, True)}
"""Every so many-th stream is constrained (0: none), and whether the strings of its schema have a longest length."""


def schema(number: int, min_items: int, *, bounded: bool) -> dict[str, Any]:
    """An array of records; different numbers have different schemas. `bounded`: its strings have a longest length,
    which makes masks ten times as expensive."""
    longest = {"maxLength": 24} if bounded else {}
    record = {
        "type": "object",
        "properties": {
            f"name_{number}": {"type": "string", **longest},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["red", "green", "blue"]},
            "tags": {"type": "array", "items": {"type": "string", **longest}, "maxItems": 3},
            "active": {"type": "boolean"},
        },
        "required": [f"name_{number}", "age", "kind", "tags", "active"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": record, "minItems": min_items}


def constrained(number: int, min_items: int, *, bounded: bool) -> Mapping[str, object]:
    asked = {"json": schema(number, min_items, bounded=bounded), "disable_any_whitespace": True}
    return {"structured_outputs": asked, "ignore_eos": False, "temperature": 1.0, "seed": number}


def free(number: int) -> Mapping[str, object]:
    return {"temperature": 1.0, "seed": number}


def streams(client: CompletionClient, mix: str, salt: int, options: argparse.Namespace) -> list[Streamed]:
    """All streams of a mix, at once."""
    every, bounded = MIXES[mix]
    requests = [
        TimedRequest(
            0.0,
            random_ids(options.input_tokens, "streams", salt, number),
            options.output_tokens,
            constrained(number % 8, options.output_tokens, bounded=bounded)
            if every and number % every == 0
            else free(number),
        )
        for number in range(options.streams)
    ]
    return client.when_due(requests)


def stream_line(answers: Sequence[Streamed]) -> dict[str, Any]:
    good = [answer for answer in answers if answer.ok]
    if not good:
        raise BenchmarkFailed(f"no stream was answered: {answers[0].outcome.error}")
    begin = min(answer.due_s for answer in answers)
    last = max(answer.outcome.last_s for answer in good)
    gaps_ms = [1000 * gap for answer in good for gap in answer.outcome.gaps_s]
    tokens = sum(answer.completion_tokens for answer in good)
    return {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "tokens": tokens,
        "tokens_per_s": tokens / (last - begin),
        "ttft_p50_ms": 1000 * percentile([answer.ttft_s for answer in good], 50),
        "itl_p50_ms": percentile(gaps_ms, 50),
        "itl_p99_ms": percentile(gaps_ms, 99),
    }


def first_line(client: CompletionClient, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token of requests one after the other."""
    found = []
    for number in range(options.first):
        extra = constrained(1000 + number, 1, bounded=True) if kind == "new schema" else free(number)
        prompt = random_ids(options.input_tokens, "first", kind, number)
        (answer,) = client.when_due([TimedRequest(0.0, prompt, 1, extra)])
        if not answer.ok:
            raise BenchmarkFailed(f"no first token: {answer.outcome.error}")
        found.append(1000 * answer.ttft_s)
    return {"kind": kind, "p50_ms": percentile(found, 50), "p99_ms": percentile(found, 99)}


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines = JsonLines(options.output)
    lines.begin(argv)
    best = dict.fromkeys(MIXES, 0.0)
    with served_model(options, options.tokenizer) as model:
        settings = Configuration("structured").serve(model, options)
        with running(settings) as (cluster, ready_s):
            lines.put("start", ready_s=ready_s)
            client = CompletionClient(cluster.url, cluster.model)
            for mix in MIXES:  # compiles kernels and grammars
                streams(client, mix, -1, options)
            for turn in range(options.turns):
                for mix in list(MIXES)[:: -1 if turn % 2 else 1]:
                    before = metrics(cluster)
                    line = stream_line(streams(client, mix, turn, options))
                    after = metrics(cluster)
                    line |= {name: after.total(metric) - before.total(metric) for name, metric in COUNTERS.items()}
                    lines.put("streams", mix=mix, turn=turn, **line)
                    best[mix] = max(best[mix], line["tokens_per_s"])
            for kind in ("free", "new schema", "free", "new schema"):
                lines.put("first", **first_line(client, kind, options))
    for mix, tokens_per_s in best.items():
        lines.put("ratio", mix=mix, tokens_per_s=tokens_per_s / best["free"])
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = cluster_parser("structured", __doc__)
    add = parser.add_argument
    add("--gpu", type=int, default=0, help="the GPU")
    add("--tokenizer", type=Path, help="folder of a tokenizer of the shape's family")
    add("--streams", type=int, default=64, help="streams at once")
    add("--input-tokens", type=int, default=256, help="of each prompt")
    add("--output-tokens", type=int, default=256, help="of each answer")
    add("--turns", type=int, default=3, help="times that each mix runs")
    add("--first", type=int, default=30, help="requests of each kind that are sent one after the other")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
