"""One decode worker that computes its prompts too, on one GPU: the workloads of docs/benchmarks/steps.md, as served.

    saturation   1024/256, 256 requests at once
    rate2048     2048/512 at 7 requests/s
    rate8192     8192/256 at 2 requests/s
    slow2048     2048/256 at 1 request/s, for models of 70B
    prefixes     8 prefixes of 4096 tokens, 256 more of each request's own, 64 requests at once
    single       512/256, one request at a time

`--configuration NAME:ARGUMENT,...` are workers that differ in options; they take turns on the same prompts, and each
starts once a turn. JSON lines: `start` a server; `cell` a workload, with latencies at the client in ms and what the
worker has counted, among it the prompt tokens that were computed; `failed` a server that was lost.

`--tokenizer FOLDER` is one of the shape's family. Then prompts are text, and the model has the whole vocabulary; else
prompts are token ids, and the vocabulary is the demo model's, so that a step reads up to 6 % fewer bytes.

With `--device cpu` the demo model and small sizes: to try the script, not to learn from.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from uvicorn.loops.auto import auto_loop_factory

from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.cluster.running import ServedModel, metrics, running, served_model
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import cluster_parser
from baton.benchmark.harness.processes import cpu_s
from baton.benchmark.load.experiment import Experiment, Run
from baton.benchmark.load.planner import Inputs
from baton.benchmark.load.settings import ServingSettings
from baton.launch.cluster import Cluster
from baton.launch.local import ServeSettings

PERCENTILES = (50.0, 90.0, 99.0)
VOCAB_SIZE = 2000
"""Random ids are below it: of the demo model's tokenizer, without its last ones."""
GPU_ARGUMENTS = ("--max-num-seqs=512", "--max-model-len=34816")
STAGE_SECONDS = "baton:request_stage_seconds"
COUNTERS = {
    "prompt_tokens": "baton:worker_prompt_tokens_total",
    "prompt_tokens_computed": "baton:worker_prompt_tokens_computed_total",
    "generated_tokens": "baton:worker_generated_tokens_total",
    "steps": "baton:worker_steps_total",
    "preemptions": "baton:worker_preemptions_total",
    "gap_s": "baton:worker_device_gap_seconds_total",
    "attempts_repeated": "baton:retries_total",
}


@dataclass(frozen=True, slots=True)
class ServedLoad:
    """Requests of one kind. With a rate they arrive for `duration_s`, else `num_prompts` are sent by `at_once`."""

    input_tokens: int
    output_tokens: int
    prefix_tokens: int = 0
    num_prefixes: int = 1
    num_prompts: int | None = None
    at_once: int | None = None
    rate: float | None = None
    duration_s: float | None = None


GPU_WORKLOADS = {
    "saturation": ServedLoad(1024, 256, num_prompts=768, at_once=256),
    "rate2048": ServedLoad(2048, 512, rate=7.0, duration_s=25.0),
    "rate8192": ServedLoad(8192, 256, rate=2.0, duration_s=30.0),
    "slow2048": ServedLoad(2048, 256, rate=1.0, duration_s=30.0),
    "prefixes": ServedLoad(256, 128, prefix_tokens=4096, num_prefixes=8, num_prompts=512, at_once=64),
    "single": ServedLoad(512, 256, num_prompts=8, at_once=1),
}
CPU_WORKLOADS = {
    "saturation": ServedLoad(96, 16, num_prompts=32, at_once=16),
    "rate2048": ServedLoad(96, 16, rate=4.0, duration_s=2.0),
    "rate8192": ServedLoad(200, 8, rate=2.0, duration_s=2.0),
    "slow2048": ServedLoad(96, 16, rate=1.0, duration_s=2.0),
    "prefixes": ServedLoad(16, 8, prefix_tokens=128, num_prefixes=4, num_prompts=32, at_once=16),
    "single": ServedLoad(32, 16, num_prompts=3, at_once=1),
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """Options of the worker, under a name."""

    name: str
    arguments: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """From "chunks:--max-chunk-tokens=1024,--max-num-batched-tokens=1280"."""
        name, _, arguments = text.partition(":")
        return cls(name, tuple(filter(None, arguments.split(","))))

    def serve(self, model: ServedModel, options: argparse.Namespace) -> ServeSettings:
        on_gpu = options.device == "cuda"
        sizes = GPU_ARGUMENTS if on_gpu else ()
        return ServeSettings(
            model=model.name,
            prefill=0,
            decode=1,
            device=options.device,
            gpus=(options.gpu,) if on_gpu else (),
            local_prefill="always",
            store_ram_gib=0.0,
            worker_arg=(*model.worker_args, *sizes, *options.worker_arg, *self.arguments),
            start_timeout_s=options.start_timeout_s,
        )


def send(cluster: Cluster, workload: ServedLoad, salt: int, options: argparse.Namespace) -> Run:
    """One run of the load generator; equal salts send equal prompts."""
    settings = ServingSettings(
        base_url=cluster.url,
        model=(cluster.model,),
        random_input_len=workload.input_tokens,
        random_output_len=workload.output_tokens,
        random_prefix_len=workload.prefix_tokens,
        num_prefixes=workload.num_prefixes,
        num_prompts=workload.num_prompts,
        max_concurrency=workload.at_once,
        request_rate=(f"{workload.rate}",) if workload.rate else (),
        duration_s=workload.duration_s,
        num_warmups=0,
        ignore_eos=True,
        temperature=1.0,
        vocab_size=VOCAB_SIZE,
        prompt_as="text" if options.tokenizer else "ids",
        tokenizer=str(options.tokenizer or ""),
        request_timeout_s=options.request_timeout_s,
    )

    async def run() -> Run:
        experiment = Experiment(settings, Inputs((), ()), salt, None)
        (server,) = await experiment.find_servers()
        return await experiment.run(server, settings.rates[0], options.seed)

    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(run())


def cell(run: Run, before: MetricsPage, after: MetricsPage, proxy_cpu_s: float) -> dict[str, object]:
    """What one workload showed: at the client, in the proxy, and in the worker's counters."""
    summary = run.summary
    stage = {"until": "first_token", "stage": "tokenise"}
    tokenise = after.histogram(STAGE_SECONDS, **stage).since(before.histogram(STAGE_SECONDS, **stage))
    latencies = {
        f"{name}_ms": {f"p{percentile:g}": summary.latencies[name].at(percentile) for percentile in PERCENTILES}
        for name in ("ttft", "tpot", "itl")
    }
    return {
        "requests": run.num_requests,
        "completed": summary.completed,
        "failed": summary.failed + summary.unsent,
        "failures": dict(summary.failures),
        "seconds": summary.duration_s,
        "output_tokens_per_s": summary.output_throughput,
        **latencies,
        "counted": {name: after.total(metric) - before.total(metric) for name, metric in COUNTERS.items()},
        "tokenise_mean_ms": 1000 * tokenise.mean,
        "proxy_cores": proxy_cpu_s / summary.duration_s,
        "client_cores": run.client_cpu_cores,
        "load": run.machine_load,
    }


def measure(
    configuration: Configuration, turn: int, model: ServedModel, options: argparse.Namespace, lines: JsonLines
) -> None:
    """Start a server, warm it up, and go through the workloads."""
    workloads = CPU_WORKLOADS if options.device == "cpu" else GPU_WORKLOADS
    with running(configuration.serve(model, options)) as (cluster, ready_s):
        lines.put("start", configuration=configuration.name, turn=turn, ready_s=ready_s)
        warm_up = replace(workloads["saturation"], output_tokens=16, num_prompts=4)
        send(cluster, warm_up, 100_000 + turn, options)
        for number, name in enumerate(options.workloads):
            before, cpu_before_s = metrics(cluster), cpu_s([cluster.pid("proxy")])
            run = send(cluster, workloads[name], 1000 * options.seed + 10 * turn + number, options)
            found = cell(run, before, metrics(cluster), cpu_s([cluster.pid("proxy")]) - cpu_before_s)
            lines.put("cell", configuration=configuration.name, turn=turn, workload=name, **found)
            if not run.summary.completed:
                raise BenchmarkFailed(f"{configuration.name}: no request was answered: {run.summary.failures}")


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines, status = JsonLines(options.output), 0
    lines.begin(argv)
    with served_model(options, options.tokenizer) as model:
        for turn in range(options.turns):
            for configuration in options.configuration[:: -1 if turn % 2 else 1]:
                try:
                    measure(configuration, turn, model, options, lines)
                except BenchmarkFailed as error:  # the others may go
                    lines.put("failed", configuration=configuration.name, turn=turn, error=str(error))
                    status = 1
    return status


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = cluster_parser("one-gpu", __doc__)
    add = parser.add_argument
    add("--gpu", type=int, default=0, help="the GPU")
    add("--workloads", nargs="+", default=list(GPU_WORKLOADS), choices=GPU_WORKLOADS, help="workloads to measure")
    default = [Configuration("default")]
    add("--configuration", type=Configuration.parse, nargs="+", default=default, help="NAME:ARGUMENT,... of the worker")
    add("--tokenizer", type=Path, help="folder of a tokenizer of the shape's family; default: the demo model's")
    add("--turns", type=int, default=1, help="times that each configuration is started; the order alternates")
    add("--seed", type=int, default=0, help="of prompts and arrivals")
    add("--request-timeout-s", type=float, default=60.0, help="a request that takes longer has failed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
