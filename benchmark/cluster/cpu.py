"""Speed on the CPU: the whole system over HTTP against transformers.generate, in interleaved rounds of one run.

A JSON line for each round, then a table. Only the ratios are comparable between machines. Both sides compute the same
prompts with the same model in float32; the server is started as `baton serve` starts it. No prompt comes twice, so no
prefix cache helps. On a machine that others use as well, see "cores used by other programs" and "tokens a CPU second",
which does not depend on them. The plan of the rounds and the arithmetic are here; what runs beside the server is in
sides.py.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from baton.benchmark.cluster.completions import CompletionClient
from baton.benchmark.cluster.running import running
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import (
    MeasuringChild,
    answer_requests,
    busy_s,
    child_environment,
    cpu_s,
    machine_text,
    peak_memory_mb,
)
from baton.benchmark.harness.statistics import median_text
from baton.benchmark.load.table import markdown
from baton.launch.local import ServeSettings
from baton.node.modelhub import locate_model

T = TypeVar("T")

SENTENCES = """\
Once upon a time there was a little fox who lived in the forest.
The old king had three daughters, and the youngest was the bravest of them all.
It was raining, and the children stayed inside to play with their wooden blocks.
A brave little boat sailed across the big blue lake until the wind went to sleep.
Tom had a red ball. He loved to throw it high into the air.
In the middle of the night the clock struck twelve and the mouse woke up.
The cat sat on the wall and looked at the moon.
One day, a girl named Lily found a shiny stone in the garden.
There was once a poor woodcutter who lived with his wife and his seven sons.
Far away, where the river meets the sea, there stood a house with a green door.
Mia and Ben went to the park with their dog. They saw a big tree.
The baker made bread every morning, and every morning the birds came to the window.
When spring came, the snow melted and the first flowers looked out of the ground.
The little train puffed up the hill and said to itself that it would get there.
Grandmother put on her glasses, opened the big book, and began to read.
The duck had five yellow ducklings. The smallest one was always the last.""".splitlines()


class Prompts:
    """Prompts of 32 to 64 tokens that never repeat: the first block of each holds a number of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(0)
        self._given = 0

    def take(self, count: int) -> list[str]:
        return [self._one() for _ in range(count)]

    def ids(self, prompt: str) -> list[int]:
        return list(self._tokenizer.encode(prompt).ids)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _one(self) -> str:
        self._given += 1
        text = f"Story {self._given}. " + " ".join(self._random.sample(SENTENCES, 5))
        length = self._random.randint(32, 64)
        return str(self._tokenizer.decode(self._tokenizer.encode(text, add_special_tokens=False).ids[:length]))


@dataclass(frozen=True, slots=True)
class CpuBenchmark:
    """What a round needs. Throughputs are tokens/s; CPU figures are CPU seconds of all processes for 1000 tokens."""

    prompts: Prompts
    client: CompletionClient
    reference: MeasuringChild
    """transformers."""
    bare: MeasuringChild
    """Our model's bare decode step."""
    served: tuple[int, ...]
    """Process ids of the proxy and the workers."""
    options: argparse.Namespace

    def round(self) -> dict[str, Any]:
        """Our side runs before and after the reference, so that a drift of the machine meets both."""
        many = self.prompts.take(self.options.concurrency)
        before = self._serve(many)
        batch = self._generate(many, batched=True)
        ones = self._generate(many[: self.options.one_by_one], batched=False)
        after = self._serve(self.prompts.take(self.options.concurrency))
        gaps_ms, steps_ms = [], []
        for text in self.prompts.take(2):
            gaps_ms += self._serve([text])["gaps_ms"]
            steps_ms += self.bare.ask({"prompt": self.prompts.ids(text), "new_tokens": self.options.new_tokens})
        served = {name: before[name] + after[name] for name in ("tokens", "seconds", "cpu_s", "cached_tokens")}
        expected = [self.prompts.text(ids) for ids in ones["ids"]]
        return {
            "served": served["tokens"] / served["seconds"],
            "static_batch": batch["tokens"] / batch["seconds"],
            "one_by_one": ones["tokens"] / ones["seconds"],
            "served_cpu": 1000 * served["cpu_s"] / served["tokens"],
            "static_batch_cpu": 1000 * batch["cpu_s"] / batch["tokens"],
            "one_by_one_cpu": 1000 * ones["cpu_s"] / ones["tokens"],
            "gap_ms": statistics.median(gaps_ms),
            "step_ms": statistics.median(steps_ms),
            "gap_mean_ms": statistics.mean(gaps_ms),
            "step_mean_ms": statistics.mean(steps_ms),
            "ttft_ms": before["ttft_ms"],
            "cached_tokens": served["cached_tokens"],
            "others_served": (before["others"] + after["others"]) / 2,
            "others_static_batch": batch["others"],
            "others_one_by_one": ones["others"],
            "equal_texts": f"{sum(map(str.__eq__, expected, before['texts']))}/{len(expected)}",
        }

    def _serve(self, texts: list[str]) -> dict[str, Any]:
        answers, spent = timed(self.served, os.getpid(), lambda: self.client.at_once(texts, self.options.new_tokens))
        return {
            "seconds": max(answer.outcome.last_s for answer in answers) - answers[0].due_s,
            "tokens": sum(answer.completion_tokens for answer in answers),
            "cached_tokens": sum(answer.cached_tokens for answer in answers),
            "ttft_ms": 1000 * statistics.median(answer.ttft_s for answer in answers),
            "gaps_ms": [1000 * gap for answer in answers for gap in answer.outcome.gaps_s],
            "texts": [answer.outcome.text for answer in answers],
            **spent,
        }

    def _generate(self, texts: list[str], *, batched: bool) -> dict[str, Any]:
        ids = [self.prompts.ids(text) for text in texts]
        request = {"prompts": ids, "new_tokens": self.options.new_tokens, "batched": batched}
        answer, spent = timed((self.reference.pid,), self.reference.pid, lambda: self.reference.ask(request))
        return {**answer, **spent}


def timed(pids: tuple[int, ...], own: int, work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What `work` returns; the CPU time of `pids` meanwhile, and how many cores other processes than these and `own`
    used."""
    ours = {*pids, own}
    cpu_before, ours_before, busy_before, begin = cpu_s(pids), cpu_s(ours), busy_s(), time.perf_counter()
    found = work()
    used_s, all_s, passed_s = cpu_s(ours) - ours_before, busy_s() - busy_before, time.perf_counter() - begin
    return found, {"cpu_s": cpu_s(pids) - cpu_before, "others": max(0.0, all_s - used_s) / passed_s}


def measure(options: argparse.Namespace, lines: JsonLines) -> tuple[list[dict[str, Any]], float]:
    """A row for each round, and the idle proxy's peak memory in MB."""
    folder, environment, rows = locate_model(options.model), child_environment(), []
    environment.pop("OMP_NUM_THREADS", None)  # workers share the cores; a measuring process has an option for it
    settings = ServeSettings(
        model=options.model,
        device="cpu",
        local_prefill="short",  # every prompt through the prefill worker
        worker_arg=tuple(options.worker_arg),
        proxy_arg=tuple(options.proxy_arg),
    )
    transformers = ("cpu", "--side=transformers", f"--model={folder}", f"--threads={options.threads}")
    step = ("cpu", "--side=step", f"--model={folder}", f"--threads={options.step_threads}")
    with (
        running(settings, environ=environment) as (cluster, _),
        MeasuringChild(*transformers, environment=environment) as reference,
        MeasuringChild(*step, environment=environment) as bare,
    ):
        proxy_mb = peak_memory_mb(cluster.pid("proxy"))
        reference.receive()  # it has loaded the model
        bare.receive()
        prompts = Prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))
        served = tuple(map(cluster.pid, cluster.running()))
        client = CompletionClient(cluster.url, cluster.model)
        benchmark = CpuBenchmark(prompts, client, reference, bare, served, options)
        benchmark.round()  # warms up
        for number in range(options.rounds):
            rows.append({"round": number, **benchmark.round()})
            lines.write(**rows[-1])
    return rows, proxy_mb


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    if options.side:
        from baton.benchmark.cluster import sides  # torch, which the client does not need

        make = sides.transformers_side if options.side == "transformers" else sides.step_side
        answer = make(Path(options.model), options.threads)
        print('"ready"', flush=True)
        answer_requests(answer)
        return 0
    exit_on_sigterm()
    rows, proxy_mb = measure(options, JsonLines(options.output))
    print(report(options, rows, proxy_mb))
    return 0


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]], proxy_mb: float) -> str:
    """Medians over the rounds; a ratio is the median of the rounds' ratios, with the least and the largest."""

    def median(name: str) -> float:
        return statistics.median([row[name] for row in rows])

    over_one = [row["served"] / row["one_by_one"] for row in rows]
    over_batch = [row["served"] / row["static_batch"] for row in rows]
    cpu_over_batch = [row["static_batch_cpu"] / row["served_cpu"] for row in rows]
    overhead = [row["gap_ms"] - row["step_ms"] for row in rows]
    mean_overhead = [row["gap_mean_ms"] - row["step_mean_ms"] for row in rows]
    table = [
        (f"served, {options.concurrency} at once / transformers one by one", median_text(over_one), ">= 4"),
        (f"served, {options.concurrency} at once / transformers' static batch", median_text(over_batch), ">= 1"),
        ("serving overhead a token, 1 at once, p50, ms", median_text(overhead), "< 3"),
        ("the same, of the means", median_text(mean_overhead), ""),
        ("peak memory of the idle proxy, MB", f"{proxy_mb:.0f}", "< 250"),
        ("tokens a CPU second, served / static batch", median_text(cpu_over_batch), ""),
        ("served, tokens/s", f"{median('served'):.0f}", ""),
        ("transformers one by one, tokens/s", f"{median('one_by_one'):.0f}", ""),
        ("transformers' static batch, tokens/s", f"{median('static_batch'):.0f}", ""),
        ("gap between streamed tokens, 1 at once, p50, ms", f"{median('gap_ms'):.2f}", ""),
        ("bare decode step, 1 row, p50, ms", f"{median('step_ms'):.2f}", ""),
        ("CPU seconds for 1000 tokens: served", f"{median('served_cpu'):.2f}", ""),
        ("... transformers' static batch", f"{median('static_batch_cpu'):.2f}", ""),
        ("... transformers one by one", f"{median('one_by_one_cpu'):.2f}", ""),
        ("cores used by other programs while served", median_text([row["others_served"] for row in rows]), ""),
        ("... while the static batch ran", median_text([row["others_static_batch"] for row in rows]), ""),
        (f"time to first token, {options.concurrency} at once, p50, ms", f"{median('ttft_ms'):.0f}", ""),
    ]
    return "\n".join(
        [
            markdown(("measure", "median (range of the rounds)", "target"), table),
            f"{machine_text()}; {len(rows)} rounds; {options.new_tokens} tokens a request; "
            f"threads: transformers {options.threads}, bare step {options.step_threads}, workers: as baton serve",
        ]
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("cpu", __doc__)
    parser.add_argument("--model", default="demo", help="the demo model, or a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that warms up")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once, and rows of the static batch")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens a request")
    parser.add_argument("--one-by-one", type=int, default=4, help="requests that transformers gets one after the other")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of transformers")
    parser.add_argument("--step-threads", type=int, default=1, help="threads of the bare step: those of a worker")
    parser.add_argument("--worker-arg", action="append", default=[], help="passed on to each worker")
    parser.add_argument("--proxy-arg", action="append", default=[], help="passed on to the proxy")
    parser.add_argument("--side", choices=("transformers", "step"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
