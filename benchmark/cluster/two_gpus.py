"""One prefill and one decode worker against two colocated decode workers, on the same two GPUs, one after the other.

    disagg      every prompt goes to the prefill worker
    auto        the default: the decode worker computes those itself for which that is worth it
    colocated   every prompt is computed where it is decoded
    adaptive    both workers are mixed: the router changes their shares of prompts and answers by the load

Each system starts once and gets the same random prompts at the same (Poisson) times: open loop, at each rate of each
workload for `--duration-s`, and until the last answer has ended. JSON lines: `start` a system; `cell` a system, a
workload and a rate; at the end `ratio` lines. Definitions:

    ttft, tpot, itl   as the load test defines them, at the client, in ms
    goodput           part of the requests that keep TTFT and TPOT of --goodput
    hand_over         first token to second at the client, and the proxy's stages until the second token, in ms: their
                      means sum to its own; percentiles come from the buckets of its histograms
    kv                transfers between workers and their failures; gaps between decode steps on the GPU

With `--device cpu` the demo model and small sizes: to try the script, not to learn from.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from uvicorn.loops.auto import auto_loop_factory

from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.cluster.running import ServedModel, metrics, running, served_model
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import cluster_parser
from baton.benchmark.load.experiment import Experiment, Run
from baton.benchmark.load.planner import Inputs
from baton.benchmark.load.record import Record
from baton.benchmark.load.settings import ServingSettings
from baton.benchmark.load.summary import Distribution
from baton.launch.cluster import Cluster
from baton.launch.local import ServeSettings

DISAGGREGATED, AUTO, COLOCATED, ADAPTIVE = SYSTEMS = ("disagg", "auto", "colocated", "adaptive")
LOCAL_PREFILL = {DISAGGREGATED: "never", AUTO: "auto", COLOCATED: "always"}
OBJECTIVES = {"ttft": "--slo-ttft-ms", "tpot": "--slo-tpot-ms"}
PERCENTILES = (50.0, 90.0, 99.0)
STAGES = ("transfer_wait", "transfer", "decode_admission", "first_step", "network", "reply")
GPU_WORKLOADS = ("2048/512@7,10,14", "8192/256@2,3.5,4.5")
CPU_WORKLOADS = ("96/24@2,4", "384/12@1")
WARMUP_REQUESTS = 4
WARMUP_TOKENS = 32
VOCAB_SIZE = 4000
"""Random ids are below it: of the demo model's tokenizer, without its last ones."""
RATIOS = {
    "ttft_p50": ("ttft_ms", "p50"),
    "ttft_p99": ("ttft_ms", "p99"),
    "tpot_p50": ("tpot_ms", "p50"),
    "tpot_p99": ("tpot_ms", "p99"),
    "itl_p50": ("itl_ms", "p50"),
    "itl_p99": ("itl_ms", "p99"),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts and answers of these lengths, at each of the rates."""

    input_tokens: int
    output_tokens: int
    rates: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From "2048/512@7,10,14"; raises ValueError, which argparse turns into words."""
        lengths, _, rates = text.partition("@")
        input_tokens, _, output_tokens = lengths.partition("/")
        found = cls(int(input_tokens), int(output_tokens), tuple(float(rate) for rate in rates.split(",")))
        if min(found.input_tokens, found.output_tokens - 1, *found.rates) <= 0:
            raise ValueError(f"workload {text!r}: numbers above 0, and answers of 2 tokens at least")
        return found

    def __str__(self) -> str:
        return f"{self.input_tokens}/{self.output_tokens}"


@dataclass(frozen=True, slots=True)
class System:
    """One way to use the two GPUs. `chunk_tokens`: of colocated workers' prompts in a step; 0: their default."""

    name: str
    chunk_tokens: int = 0

    def serve(self, model: ServedModel, options: argparse.Namespace) -> ServeSettings:
        prefill, decode = (0, 2) if self.name == COLOCATED else (1, 1)
        chunk = (f"--max-chunk-tokens={self.chunk_tokens}",) if self.chunk_tokens else ()
        plane = (f"--plane={options.plane}",) if options.plane else ()
        return ServeSettings(
            model=model.name,
            prefill=prefill,
            decode=decode,
            device=options.device,
            gpus=tuple(options.gpus) if options.device == "cuda" else (),
            roles="adaptive" if self.name == ADAPTIVE else "fixed",
            local_prefill=LOCAL_PREFILL.get(self.name),
            proxy_arg=objective_arguments(options.goodput),
            store_ram_gib=0.0,
            worker_arg=(*model.worker_args, *longest_argument(options), *plane, *chunk, *options.worker_arg),
            start_timeout_s=options.start_timeout_s,
        )

    def __str__(self) -> str:
        return f"{self.name}-{self.chunk_tokens}" if self.chunk_tokens else self.name


def objective_arguments(goodput: Sequence[str]) -> tuple[str, ...]:
    """The proxy's objectives, from "ttft:1000" and so on."""
    pairs = [text.partition(":") for text in goodput]
    return tuple(f"{OBJECTIVES[name]}={value}" for name, _, value in pairs if name in OBJECTIVES)


def longest_argument(options: argparse.Namespace) -> tuple[str, ...]:
    """Room for the longest sequence of the workloads; the demo model has a length of its own."""
    if options.device == "cpu":
        return ()
    longest = max(workload.input_tokens + workload.output_tokens for workload in options.workload)
    return (f"--max-model-len={1024 * -(-longest // 1024)}",)


def systems(options: argparse.Namespace) -> list[System]:
    """In the order in which they run."""
    found = [System(name) for name in (DISAGGREGATED, AUTO, ADAPTIVE) if name in options.systems]
    if COLOCATED in options.systems:
        found += [System(COLOCATED, chunk) for chunk in options.colocated_chunk_tokens]
    return found


# ---- one cell -----------------------------------------------------------------------------------------------------


def send(cluster: Cluster, workload: Workload, rate: float | None, salt: int, options: argparse.Namespace) -> Run:
    """One run of the load generator; with no rate a warm-up."""
    settings = ServingSettings(
        base_url=cluster.url,
        model=(cluster.model,),
        random_input_len=workload.input_tokens,
        random_output_len=workload.output_tokens if rate else min(WARMUP_TOKENS, workload.output_tokens),
        request_rate=(f"{rate}",) if rate else (),
        duration_s=options.duration_s if rate else None,
        num_prompts=None if rate else WARMUP_REQUESTS,
        num_warmups=0,
        ignore_eos=True,
        temperature=1.0,
        vocab_size=VOCAB_SIZE,
        request_timeout_s=options.request_timeout_s,
        goodput=tuple(options.goodput),
    )

    async def run() -> Run:
        experiment = Experiment(settings, Inputs((), ()), salt, None)
        (server,) = await experiment.find_servers()
        return await experiment.run(server, settings.rates[0], options.seed)

    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(run())


def shown(found: Distribution) -> dict[str, float]:
    return {"mean": found.mean, **{f"p{percentile:g}": found.at(percentile) for percentile in PERCENTILES}}


def client_hand_over(records: Sequence[Record]) -> Distribution:
    """First chunk to second; an answer whose first two tokens came in one chunk has its next one here."""
    return Distribution.of([each.gaps_s[0] for each in records if each.completed and each.gaps_s], PERCENTILES)


def stages(before: MetricsPage, after: MetricsPage) -> dict[str, dict[str, float]]:
    """Of the time from the first token to the second, in ms, by the proxy's clock."""
    name, found = "baton:request_stage_seconds", {}
    for stage in STAGES:
        labels = {"until": "second_token", "stage": stage}
        spent = after.histogram(name, **labels).since(before.histogram(name, **labels))
        quantiles = {f"p{percentile:g}": 1000 * spent.quantile(percentile / 100) for percentile in PERCENTILES}
        found[stage] = {"mean": 1000 * spent.mean, **quantiles}
    return found


def moved(before: MetricsPage, after: MetricsPage) -> dict[str, float]:
    """Counters of the cell: transfers between workers, and failures."""
    names = {
        "disaggregated": "baton:routed_disaggregated_total",
        "local_sooner": "baton:routed_local_sooner_total",
        "local_always": "baton:routed_local_always_total",
        "bytes": "baton:transfer_bytes_total",
        "transfers": "baton:worker_transfers_received_total",
        "transfers_failed": "baton:worker_transfers_failed_total",
        "digest_retries": "baton:worker_digest_retries_total",
        "preemptions": "baton:worker_preemptions_total",
        "steps_behind_others": "baton:worker_device_gaps_total",
        "steps_within_50_us": "baton:worker_device_gaps_short_total",
        "gap_s": "baton:worker_device_gap_seconds_total",
        "attempts_repeated": "baton:retries_total",
        "busy": "baton:busy_total",
    }
    return {short: after.total(name) - before.total(name) for short, name in names.items()}


def cell(
    system: System, workload: Workload, rate: float, run: Run, pages: tuple[MetricsPage, MetricsPage]
) -> dict[str, object]:
    """The line of one system, workload and rate; `pages` are the metrics before and after."""
    summary = run.summary
    distributions = {f"{name}_ms": shown(summary.latencies[name]) for name in ("ttft", "tpot", "itl")}
    return {
        "system": str(system),
        "workload": str(workload),
        "rate": rate,
        "requests": run.num_requests,
        "completed": summary.completed,
        "failed": summary.failed + summary.unsent,
        "failures": dict(summary.failures),
        "seconds": summary.duration_s,
        "output_tokens_per_s": summary.output_throughput,
        **distributions,
        "goodput": summary.attainment,
        "hand_over_ms": {"client": shown(client_hand_over(run.records)), **stages(*pages)},
        "kv": moved(*pages),
        "tokens_per_chunk": summary.tokens_per_chunk,
        "schedule_lag_p99_ms": summary.schedule_lag.at(99.0),
        "client_cores": run.client_cpu_cores,
        "load": run.machine_load,
    }


# ---- all of them --------------------------------------------------------------------------------------------------


def measure(
    system: System, model: ServedModel, options: argparse.Namespace, lines: JsonLines
) -> list[dict[str, object]]:
    """Start the system, warm it up, and go through all cells; a cell in which everything failed ends it."""
    found = []
    with running(system.serve(model, options)) as (cluster, ready_s):
        lines.put("start", system=str(system), ready_s=ready_s)
        for place, workload in enumerate(options.workload):
            send(cluster, workload, None, 1000 * options.seed + place, options)
            for number, rate in enumerate(workload.rates):
                before = metrics(cluster)
                run = send(cluster, workload, rate, 1000 * options.seed + 100 * (place + 1) + number, options)
                found.append(cell(system, workload, rate, run, (before, metrics(cluster))))
                lines.put("cell", **found[-1])
                if not run.summary.completed:
                    raise BenchmarkFailed(f"{system}: no request was answered: {run.summary.failures}")
    return found


def ratios(cells: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Every cell of a system with a prefill worker against the colocated ones of its workload and rate."""
    found = []
    for mine, theirs in product(cells, cells):
        same = {name: mine[name] for name in ("workload", "rate")}
        if not str(theirs["system"]).startswith(COLOCATED) or str(mine["system"]).startswith(COLOCATED):
            continue
        if same != {name: theirs[name] for name in same}:
            continue
        values = {name: _ratio(mine[metric], theirs[metric], at) for name, (metric, at) in RATIOS.items()}
        goodput = {"goodput": mine["goodput"], "goodput_colocated": theirs["goodput"]}
        found.append({**same, "system": mine["system"], "against": theirs["system"], **values, **goodput})
    return found


def _ratio(mine: object, theirs: object, at: str) -> float | None:
    assert isinstance(mine, dict) and isinstance(theirs, dict), (mine, theirs)
    return mine[at] / theirs[at] if theirs[at] else None


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines, cells, status = JsonLines(options.output), [], 0
    lines.begin(argv)
    with served_model(options) as model:
        for system in systems(options):
            try:
                cells += measure(system, model, options, lines)
            except BenchmarkFailed as error:  # the others may go
                lines.put("failed", system=str(system), error=str(error))
                status = 1
    for ratio in ratios(cells):
        lines.put("ratio", **ratio)
    return status


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = cluster_parser("two-gpus", __doc__)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[0, 1], help="the GPUs")
    add("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS, help="systems to measure")
    add("--colocated-chunk-tokens", type=int, nargs="+", default=[0], help="a colocated system for each; 0: default")
    add("--workload", type=Workload.parse, nargs="+", help=f"INPUT/OUTPUT@RATES; default {' '.join(GPU_WORKLOADS)}")
    add("--duration-s", type=float, default=12.0, help="requests are due within so long")
    add("--goodput", nargs="+", default=["ttft:1000", "tpot:15"], help="objectives in ms")
    add("--plane", choices=("cuda_ipc", "nccl", "shm", "zmq"), help="the only data plane; default: the best")
    add("--seed", type=int, default=0, help="of prompts and arrivals")
    add("--request-timeout-s", type=float, default=60.0, help="a request that takes longer has failed")
    options = parser.parse_args(argv)
    default = CPU_WORKLOADS if options.device == "cpu" else GPU_WORKLOADS
    options.workload = options.workload or [Workload.parse(text) for text in default]
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
