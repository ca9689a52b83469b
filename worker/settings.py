"""The settings that both kinds of worker have. A role adds its own by extending the dataclass."""

from __future__ import annotations

from dataclasses import dataclass

from node.settings import option


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    model: str = option("demo", help="model: a Hugging Face folder, a hub id, or 'demo'")
    proxy: tuple[str, ...] = option(
        ("tcp://127.0.0.1:5570",), metavar="ADDRESS", help="control address of a proxy to join; repeat it for several"
    )
    worker_id: str = option("", help="name of this worker in logs and metrics; default: its role and process id")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    dtype: str = option(
        "auto", choices=("auto", "float32", "bfloat16"), help="dtype of weights and KV; auto: float32 on CPU"
    )
    load_format: str = option("auto", choices=("auto", "dummy"), help="dummy: random weights of the model's shape")
    bind: str = option("tcp://127.0.0.1:0", help="address for peers; port 0 takes a free one")
    insecure_network: bool = option(False, help="allow binding to an address that other machines can reach")
    plane: tuple[str, ...] = option(
        ("shm", "zmq"), metavar="{shm,zmq}", help="data planes to offer, best first; repeat it for several"
    )
    block_tokens: int = option(16, unit="tokens", help="size of a KV block", minimum=1, maximum=1024)
    kv_memory_gib: float = option(0.5, unit="GiB", help="size of the KV pool", minimum=0.0001)
    num_blocks: int = option(0, unit="blocks", help="size of the KV pool; 0: from --kv-memory-gib", minimum=0)
    max_model_len: int = option(0, unit="tokens", help="longest sequence; 0: what the model's config says", minimum=0)
    max_num_seqs: int = option(64, unit="sequences", help="most requests in work at once", minimum=1, maximum=4096)
    max_num_batched_tokens: int = option(512, unit="tokens", help="token budget of a step", minimum=1, maximum=1 << 20)
    max_waiting: int = option(1024, unit="requests", help="most requests queued in this worker", minimum=1)
    chunk_mib: float = option(4.0, unit="MiB", help="most KV bytes in one transfer message", minimum=0.001, maximum=64)
    threads: int = option(0, unit="threads", help="CPU threads of the model; 0: torch's default", minimum=0)
    store: str = option("", metavar="ADDRESS", help="address of the host's KV store; not given: none is used")
    store_loads: str = option(
        "measured",
        choices=("measured", "always"),
        help="load a prefix from the store when that is measured to be faster than computing it, or always",
    )
    drain_s: float = option(30.0, unit="s", help="time that running requests get to end after SIGTERM", minimum=0)
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="least level that is logged")
