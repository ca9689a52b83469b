"""The settings that both kinds of worker have. A role adds its own by extending the dataclass.

Sizes that are left at 0 depend on the device: `for_device` gives the settings with those filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from baton.node.settings import option

CPU_SIZES: Mapping[str, Any] = {
    "plane": ("shm", "zmq"),
    "block_tokens": 16,
    "kv_memory_gib": 0.5,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "chunk_mib": 4.0,
}
CUDA_SIZES: Mapping[str, Any] = {
    "plane": ("cuda_ipc", "nccl"),
    "block_tokens": 64,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "chunk_mib": 64.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    model: str = option("demo", help="model: a Hugging Face folder, a hub id, or 'demo'")
    proxy: tuple[str, ...] = option(
        ("tcp://127.0.0.1:5570",), metavar="ADDRESS", help="control address of a proxy to join; repeat it for several"
    )
    worker_id: str = option("", help="name of this worker in logs and metrics; default: its role and process id")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    gpu: int = option(0, help="number of the GPU, where the model runs on one", minimum=0)
    dtype: str = option(
        "auto",
        choices=("auto", "float32", "bfloat16"),
        help="dtype of weights and KV; auto: float32, on a GPU bfloat16",
    )
    load_format: str = option("auto", choices=("auto", "dummy"), help="dummy: random weights of the model's shape")
    bind: str = option("tcp://127.0.0.1:0", help="address for peers; port 0 takes a free one")
    insecure_network: bool = option(False, help="allow binding to an address that other machines can reach")
    plane: tuple[str, ...] = option(
        (),
        metavar="{shm,zmq,cuda_ipc,nccl}",
        help="data planes to offer, best first; default: shm zmq, on a GPU cuda_ipc nccl",
    )
    block_tokens: int = option(0, unit="tokens", help="size of a KV block; 0: 16, on a GPU 64", minimum=0, maximum=1024)
    kv_memory_gib: float = option(
        0.0, unit="GiB", help="size of the KV pool; 0: 0.5, on a GPU from --gpu-memory-utilization", minimum=0
    )
    gpu_memory_utilization: float = option(
        0.9,
        help="share of a GPU's memory that this worker may use, for weights, KV pool and graphs together",
        minimum=0.01,
        maximum=0.99,
    )
    num_blocks: int = option(0, unit="blocks", help="size of the KV pool; 0: from --kv-memory-gib", minimum=0)
    max_model_len: int = option(0, unit="tokens", help="longest sequence; 0: what the model's config says", minimum=0)
    max_num_seqs: int = option(
        0, unit="sequences", help="most requests in work at once; 0: 64, on a GPU 256", minimum=0, maximum=4096
    )
    max_num_batched_tokens: int = option(
        0,
        unit="tokens",
        help="token budget of a step; 0: 512, on a GPU 8192, to prefill 4096",
        minimum=0,
        maximum=1 << 20,
    )
    max_waiting: int = option(1024, unit="requests", help="most requests queued in this worker", minimum=1)
    chunk_mib: float = option(
        0.0,
        unit="MiB",
        help="most KV bytes in one transfer message, four times as many over cuda_ipc; 0: 4, on a GPU 64",
        minimum=0,
        maximum=1024,
    )
    run_ahead: int = option(
        1, unit="steps", help="steps that a GPU is given before the last one is read", minimum=0, maximum=4
    )
    deterministic: bool = option(
        False, help="on a GPU: tokens that do not depend on what else is in a step, a little slower"
    )
    threads: int = option(0, unit="threads", help="CPU threads of the model; 0: torch's default", minimum=0)
    store: str = option("", metavar="ADDRESS", help="address of the host's KV store; not given: none is used")
    store_loads: str = option(
        "measured",
        choices=("measured", "always"),
        help="load a prefix from the store when that is measured to be faster than computing it, or always",
    )
    drain_s: float = option(30.0, unit="s", help="time that running requests get to end after SIGTERM", minimum=0)
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="least level that is logged")

    def sizes_of(self, device: str) -> Mapping[str, Any]:
        """What is meant where a setting is left to the device, "cpu" or "cuda"."""
        return CPU_SIZES if device == "cpu" else CUDA_SIZES

    def for_device(self, device: str) -> Self:
        """These settings, with what was left to the device filled in."""
        return replace(self, **{name: size for name, size in self.sizes_of(device).items() if not getattr(self, name)})
