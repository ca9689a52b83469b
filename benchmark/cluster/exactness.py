"""Whether a prefill and a decode worker answer with the tokens that a colocated worker answers with.

The same greedy requests of random prompts, all at once, go through both: first with workers of `--deterministic`, where
every token must be equal and its log probability bit for bit, then without, where roundings depend on what else is in a
step, and the share of equal tokens is reported. One JSON line each; exit status 1 if a deterministic answer differs.

The API shows no token ids, but tokens by their bytes, with their log probabilities: in a vocabulary only special tokens
have equal bytes. With `--device cpu` the demo model: `--deterministic` changes nothing there, and log probabilities may
differ in their last bits.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence

from baton.benchmark.cluster.completions import Completion, CompletionClient, random_ids
from baton.benchmark.cluster.running import ServedModel, metrics, running, served_model
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import cluster_parser
from baton.launch.local import ServeSettings

SPARE_BLOCKS = 64
DISAGGREGATED, COLOCATED = (1, 1), (0, 1)
"""Prefill and decode workers."""
SHOWN = 8
"""Of the requests that differ; with the place of the first difference, and both log probabilities there."""
COUNTERS = {
    "disaggregated": "baton:routed_disaggregated_total",
    "transfers": "baton:worker_transfers_received_total",
    "transfers_failed": "baton:worker_transfers_failed_total",
    "digest_retries": "baton:worker_digest_retries_total",
    "preemptions": "baton:worker_preemptions_total",
    "attempts_repeated": "baton:retries_total",
}


def settings_of(
    workers: tuple[int, int], model: ServedModel, num_blocks: int, deterministic: bool, options: argparse.Namespace
) -> ServeSettings:
    """Pools hold all requests at once: whether one is preempted must not depend on the GPU."""
    prefill, decode = workers
    strict = ("--deterministic",) if deterministic else ()
    longest = f"--max-model-len={options.longest + options.answer_tokens}"
    return ServeSettings(
        model=model.name,
        prefill=prefill,
        decode=decode,
        device=options.device,
        gpus=tuple(options.gpus) if options.device == "cuda" else (),
        local_prefill="never" if prefill else None,
        store_ram_gib=0.0,
        worker_arg=(f"--num-blocks={num_blocks}", longest, *model.worker_args, *strict, *options.worker_arg),
        start_timeout_s=options.start_timeout_s,
    )


def lengths(count: int, longest: int, seed: int) -> list[int]:
    """From 1 to `longest`, both included where there are two, in any order."""
    draw = random.Random(f"lengths/{seed}")
    return [1, longest, *(draw.randint(1, longest) for _ in range(count - 2))][:count]


def blocks_for(prompt_lengths: Sequence[int], answer_tokens: int, block_tokens: int) -> int:
    return SPARE_BLOCKS + sum(-(-(length + answer_tokens) // block_tokens) for length in prompt_lengths)


def compare(ours: Sequence[Completion], theirs: Sequence[Completion]) -> dict[str, object]:
    """Requests that are wholly equal, and tokens that are equal up to the first difference of their request.

    In tokens of prompts, of log probabilities bit for bit: the longest that is equal and the shortest that is not. The
    first below the second points to something that depends on the position, such as a table.
    """
    pairs = list(zip(ours, theirs, strict=True))
    until_first = [_equal_until(a.tokens, b.tokens) for a, b in pairs]
    differing = [n for n, (a, b) in zip(until_first, pairs, strict=True) if a.tokens != b.tokens]
    bits = {each: [a.prompt_tokens for a, b in pairs if (a.logprobs == b.logprobs) is each] for each in (True, False)}
    return {
        "equal": len(pairs) - len(differing),
        "total": len(pairs),
        "equal_tokens_share": sum(until_first) / sum(max(len(a.tokens), len(b.tokens)) for a, b in pairs),
        "first_difference": min(differing, default=None),
        "differing_at_first": differing.count(0),
        "equal_logprobs": len(bits[True]),
        "longest_equal": max(bits[True], default=None),
        "shortest_differing": min(bits[False], default=None),
        "distinct_tokens": len({token for a, _ in pairs for token in a.tokens}),
        "differing": [
            {"prompt_tokens": a.prompt_tokens, "from": n, "logprobs": [_at(a.logprobs, n), _at(b.logprobs, n)]}
            for n, (a, b) in zip(until_first, pairs, strict=True)
            if a.tokens != b.tokens
        ][:SHOWN],
    }


def is_exact(found: Mapping[str, object], device: str) -> bool:
    """Whether all answers of workers of `--deterministic` were equal; the CPU's are so in their tokens alone."""
    return found["equal"] == found["total"] and (device == "cpu" or found["equal_logprobs"] == found["total"])


def _equal_until(ours: Sequence[str], theirs: Sequence[str]) -> int:
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _at(values: Sequence[float], place: int) -> float | None:
    return values[place] if place < len(values) else None


def answers(
    settings: ServeSettings, prompts: Sequence[Sequence[int]], options: argparse.Namespace
) -> tuple[list[Completion], dict[str, float]]:
    """The answers, and what the cluster counted meanwhile that could explain other ones."""
    with running(settings) as (cluster, _):
        found = CompletionClient(cluster.url, cluster.model).complete_all(prompts, options.answer_tokens)
        page = metrics(cluster)
        return found, {short: page.total(name) for short, name in COUNTERS.items()}


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines, status = JsonLines(options.output), 0
    lines.begin(argv)
    prompt_lengths = lengths(options.requests, options.longest, options.seed)
    prompts = [random_ids(length, options.seed, number) for number, length in enumerate(prompt_lengths)]
    with served_model(options) as model:
        num_blocks = blocks_for(prompt_lengths, options.answer_tokens, model.block_tokens)
        for deterministic in (True, False) if options.ways == "both" else (options.ways == "deterministic",):
            try:
                (ours, counted), (theirs, counted_colocated) = (
                    answers(settings_of(workers, model, num_blocks, deterministic, options), prompts, options)
                    for workers in (DISAGGREGATED, COLOCATED)
                )
            except BenchmarkFailed as error:
                lines.put("failed", deterministic=deterministic, error=str(error))
                status = 1
                continue
            found = compare(ours, theirs)
            lines.put(
                "exactness",
                deterministic=deterministic,
                prompt_tokens=sum(prompt_lengths),
                **found,
                counted=counted,
                counted_colocated=counted_colocated,
            )
            status |= deterministic and not is_exact(found, options.device)
    return status


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = cluster_parser("exactness", __doc__)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[0, 1], help="the GPUs; one is enough")
    add("--ways", default="both", choices=("both", "deterministic", "default"), help="how workers compute")
    add("--requests", type=int, default=64, help="requests, all at once")
    add("--longest", type=int, default=0, help="longest prompt; 0: 2000, on CPU 400")
    add("--answer-tokens", type=int, default=64, help="length of each answer")
    add("--seed", type=int, default=0, help="of the prompts")
    options = parser.parse_args(argv)
    options.longest = options.longest or (400 if options.device == "cpu" else 2000)
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
