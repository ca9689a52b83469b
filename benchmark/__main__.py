"""baton bench NAME ...: the table of all benchmarks. Each is imported when it runs, so that this needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from baton.benchmark.harness.errors import BenchmarkFailed
from baton.node.errors import SettingsError

PROG = "baton bench"


@dataclass(frozen=True, slots=True)
class BenchmarkEntry:
    """A benchmark: its module has `main(argv) -> exit status`."""

    module: str
    help: str


BENCHMARKS: dict[str, BenchmarkEntry] = {
    "serving": BenchmarkEntry(
        "load.serving", "load test of any server with OpenAI's API: latencies, throughput, goodput"
    ),
    "null-server": BenchmarkEntry(
        "load.null_server", "a server that computes nothing, to measure a load generator with"
    ),
    "cpu": BenchmarkEntry("cluster.cpu", "serving on CPU against transformers, as ratios taken in one run"),
    "exactness": BenchmarkEntry(
        "cluster.exactness", "whether disaggregated and colocated workers answer with equal tokens"
    ),
    "one-gpu": BenchmarkEntry("cluster.one_gpu", "one colocated worker under the loads of the steps page"),
    "two-gpus": BenchmarkEntry("cluster.two_gpus", "one prefill and one decode worker against two colocated ones"),
    "structured": BenchmarkEntry("cluster.structured", "streams with answers of a given form beside free ones"),
    "reuse": BenchmarkEntry(
        "cluster.reuse", "prompt tokens computed with the KV store and without, beside an ideal cache"
    ),
    "ttft-tiers": BenchmarkEntry("cluster.ttft_tiers", "TTFT by where a prompt's KV is: computed, GPU, RAM, disk"),
    "gate": BenchmarkEntry("cluster.gate", "whether prefixes are loaded from the store exactly where that is faster"),
    "routing": BenchmarkEntry("cluster.routing", "the routing policies on a slice of a Mooncake trace"),
    "simulator": BenchmarkEntry("cluster.simulator", "the simulator against real processes, on CPU"),
    "faults": BenchmarkEntry(
        "cluster.faults", "streams while processes are killed and frozen and links stall, break and damage"
    ),
    "tenants": BenchmarkEntry("cluster.tenants", "TTFT of a light tenant alone, and beside one at ten times its load"),
    "pick": BenchmarkEntry("host.pick", "the time of one routing decision in a large cluster"),
    "vector-math": BenchmarkEntry("host.vector_math", "processes whose first table of cosines is wrong, on a CPU"),
    "masks": BenchmarkEntry("host.masks", "the time of masks of grammars, by kind of JSON value"),
    "proxies": BenchmarkEntry(
        "host.proxies", "streamed tokens/s of one proxy and of several at one port, with no model"
    ),
    "links": BenchmarkEntry("host.links", "KV hand-over and control messages over encrypted links, and in the clear"),
    "steps": BenchmarkEntry("host.steps", "single model steps on CPU, as input of `baton simulate fit`"),
    "quality": BenchmarkEntry("host.quality", "how far quantised weights and KV move a model's predictions, on texts"),
    "tiers": BenchmarkEntry("host.tiers", "GB/s of the disk tiers and of the copies to and from shared memory"),
    "decode": BenchmarkEntry("gpu.decode", "ms of a decode step on a GPU"),
    "lora": BenchmarkEntry("gpu.lora", "steps with adapters on a GPU, in turns with steps without"),
    "speculation": BenchmarkEntry("gpu.speculation", "steps with drafts on a GPU, in turns with steps without"),
    "prefill": BenchmarkEntry("gpu.prefill", "tokens/s of prompts on a GPU"),
    "kv-formats": BenchmarkEntry("gpu.kv_formats", "attention over KV in bfloat16 and in FP8 on a GPU"),
    "kernels": BenchmarkEntry("gpu.kernels", "every Triton kernel against the limits of the GPU"),
    "tune": BenchmarkEntry("gpu.tune", "tiles of quantised products on a GPU: the tables of linear_policy"),
    "deep-gemm": BenchmarkEntry("gpu.deep_gemm", "products of FP8 on a GPU beside DeepGEMM"),
    "one-row": BenchmarkEntry(
        "gpu.one_row", "tiles of plain products of one row on a GPU, beside cuBLAS, and what a softcap costs"
    ),
    "int4": BenchmarkEntry("gpu.int4", "tiles for products with 4-bit weights on a GPU, beside bf16"),
    "experts": BenchmarkEntry("gpu.experts", "routing and products of experts on a GPU"),
    "planes": BenchmarkEntry("gpu.planes", "GB/s of the data planes between two processes"),
    "reshard": BenchmarkEntry("gpu.reshard", "GB/s between groups of ranks of equal and unequal sizes"),
    "parallel": BenchmarkEntry("gpu.parallel", "norms that sum over ranks, and steps of a rank, on one GPU or several"),
    "pipeline": BenchmarkEntry("gpu.pipeline", "prompts through stages on several GPUs, beside one GPU"),
    "transfer-cost": BenchmarkEntry("gpu.transfer_cost", "ms that a KV transfer adds to the decode steps beside it"),
    "start": BenchmarkEntry("gpu.start", "seconds until a decode worker on a GPU is ready"),
}


def usage() -> str:
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {entry.help}" for name, entry in BENCHMARKS.items()]
    return "\n".join([f"usage: {PROG} NAME [options]; {PROG} NAME --help lists the options of one\n", *lines])


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that `argv` begins with; the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name = argv[0]
    entry = BENCHMARKS.get(name)
    if entry is None:
        print(f"{PROG}: there is no benchmark {name!r}; {PROG} --help lists them", file=sys.stderr)
        return 2
    try:
        return int(import_module(f"baton.benchmark.{entry.module}").main(argv[1:]))
    except (SettingsError, BenchmarkFailed) as error:
        print(f"{PROG} {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG} {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
