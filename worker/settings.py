"""The settings that both kinds of worker have, and the sizes that follow from them on a device.

A role adds its own settings by extending the dataclass. Sizes that are not given depend on the device: `worker_sizes`
returns them resolved, as a value of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from baton.models.adapters.room import ROOMS
from baton.models.config import FULL_STEP_TOKENS
from baton.models.eagle_config import EAGLE
from baton.node.addresses import ADVERTISE_HELP
from baton.node.engine_settings import EngineSettings
from baton.node.errors import SettingsError
from baton.node.orphan import ORPHAN_HELP
from baton.node.probe import PROBE_HELP
from baton.node.secret_file import INSECURE_HELP, SECRET_HELP, SECRET_VARIABLE
from baton.node.settings import option


@dataclass(frozen=True, slots=True)
class WorkerSizes:
    """Sizes of a worker on its device: as given, else the device's defaults."""

    plane: tuple[str, ...]
    block_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    chunk_mib: float
    kv_memory_gib: float | None
    """None: what the worker's share of the device leaves."""


CPU_SIZES = WorkerSizes(
    plane=("shm", "zmq"),
    block_tokens=16,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    chunk_mib=4.0,
    kv_memory_gib=0.5,
)
CUDA_SIZES = WorkerSizes(
    plane=("cuda_ipc", "nccl"),
    block_tokens=64,
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    chunk_mib=64.0,
    kv_memory_gib=None,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(EngineSettings):
    model: str = option("demo", help="model: a Hugging Face folder, a hub id, or 'demo'")
    proxy: tuple[str, ...] = option(
        ("tcp://127.0.0.1:5570",), metavar="ADDRESS", help="control address of a proxy to join; repeat it for several"
    )
    worker_id: str = option("", help="name of this worker in logs and metrics; default: its role, host and process id")
    revision: str = option(
        "",
        metavar="NAME",
        help="revision of the deployment, such as an image's tag: only workers of one revision are paired, and "
        "those of different models or KV layouts may be served side by side",
    )
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    gpu: int = option(0, help="number of the GPU, if the model runs on one", minimum=0)
    tp: int = option(
        1,
        unit="ranks",
        help="tensor parallel size: processes that share the model, 1, 2, 4 or 8; on GPUs one each, from --gpu on",
        minimum=1,
        maximum=8,
    )
    rank_gpus: tuple[int, ...] = option(
        (),
        metavar="GPU",
        help="numbers of the GPUs of --tp ranks, or --pp stages, in their order; default: from --gpu on",
        minimum=0,
    )
    pp: int = option(
        1,
        unit="stages",
        help="pipeline parallel size of a prefill worker: processes that each have some of the layers, and pass "
        "chunks of prompts on; on GPUs one each, from --gpu on",
        minimum=1,
        maximum=8,
    )
    stages_bind: str = option(
        "",
        metavar="ADDRESS",
        help="address at which the --pp stages behind the first join, each a `baton stage` on some host; default: they "
        "are processes of this host, and this worker starts them",
    )
    load_format: str = option("auto", choices=("auto", "dummy"), help="dummy: random weights of the model's shape")
    max_loras: int = option(
        0,
        unit="adapters",
        help="most LoRA adapters that one step computes with, each in memory of the device; 0: none are served",
        minimum=0,
        maximum=1024,
    )
    max_lora_rank: int = option(64, help="largest rank of an adapter", minimum=1, maximum=512)
    lora_room: tuple[str, ...] = option(
        (),
        choices=ROOMS,
        help="on a GPU: what each slot of --max-loras has room for, beside low-rank pairs of linear layers: pairs of "
        "the embedding and the head (vocabulary), of kv_b_proj of latent attention, of routers and gates of shared "
        "experts, of routed experts, which may take gigabytes; an embedding, a head and norms in place of the model's "
        "(modules_to_save); magnitudes (dora). On a CPU adapters may have all of these",
    )
    max_cpu_loras: int = option(
        128,
        unit="adapters",
        help="most adapters in the host's memory, at least --max-loras; one of routed experts may take gigabytes",
        minimum=1,
        maximum=1 << 16,
    )
    bind: str = option("tcp://127.0.0.1:0", help="address that other workers connect to; port 0: a free one")
    advertise_host: str = option("", metavar="HOST", help=ADVERTISE_HELP)
    secret_file: Path | None = option(None, metavar="FILE", env=SECRET_VARIABLE, help=SECRET_HELP)
    insecure_network: bool = option(False, help=INSECURE_HELP)
    probe_port: int | None = option(None, help=PROBE_HELP, minimum=1, maximum=65535)
    plane: tuple[str, ...] = option(
        (),
        metavar="{shm,zmq,cuda_ipc,nccl}",
        help="data planes to offer, best first; default: shm zmq, on a GPU cuda_ipc nccl",
    )
    block_tokens: int | None = option(
        None, unit="tokens", help="size of a KV block; default 16, on a GPU 64", minimum=1, maximum=1024
    )
    kv_memory_gib: float | None = option(
        None, unit="GiB", help="size of the KV pool; default 0.5, on a GPU from --gpu-memory-utilization", minimum=0
    )
    gpu_memory_utilization: float = option(
        0.9,
        help="share of a GPU's memory that this worker may use, for weights, KV pool and graphs together",
        minimum=0.01,
        maximum=0.99,
    )
    num_blocks: int | None = option(
        None, unit="blocks", help="size of the KV pool; default: from --kv-memory-gib", minimum=1
    )
    max_waiting: int = option(1024, unit="requests", help="most requests queued in this worker", minimum=1)
    chunk_mib: float | None = option(
        None,
        unit="MiB",
        help="most KV bytes in one transfer message, four times as many over cuda_ipc; default 4, on a GPU 64",
        minimum=0,
        maximum=1024,
    )
    run_ahead: int = option(
        1, unit="steps", help="steps that are launched on a GPU before the last one is read", minimum=0, maximum=4
    )
    deterministic: bool = option(
        False, help="on a GPU: make tokens independent of the other requests in a step, a little slower"
    )
    speculate: str = option(
        "off",
        metavar="{off,ngram,eagle:FOLDER}",
        help="guess several tokens at a time and verify them in one step; answers stay the same. ngram: guess what "
        "followed the last tokens earlier in the prompt or the answer. eagle: guess by the EAGLE-3 draft in a folder; "
        "prefill workers compute its KV, so all workers of a model need the option",
    )
    threads: int | None = option(
        None, unit="threads", help="CPU threads of the model; default: torch's choice", minimum=1
    )
    store: str = option("", metavar="ADDRESS", help="address of the host's KV store; default: none")
    store_loads: str = option(
        "measured",
        choices=("measured", "always"),
        help="load a prefix from the store when that is measured to be faster than computing it, or always",
    )
    drain_s: float = option(30.0, unit="s", help="time for running requests to finish after SIGTERM", minimum=0)
    orphan_s: float | None = option(None, unit="s", help=ORPHAN_HELP, minimum=0, maximum=1e6)
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="lowest level that is logged")

    def __post_init__(self) -> None:
        if self.speculate not in ("off", "ngram") and self.draft_model is None:
            raise SettingsError(f"--speculate must be one of off, ngram, eagle:FOLDER, not {self.speculate!r}")
        if self.draft_model is not None and self.pp > 1:
            raise SettingsError(f"--speculate eagle with --pp {self.pp}: no stage computes the KV of a draft")

        if self.stages_bind and self.pp == 1:
            raise SettingsError("--stages-bind with --pp 1: there is no stage behind the first")

    @property
    def draft_model(self) -> str | None:
        """The folder, or hub id, of the EAGLE-3 draft; None: none is used."""
        return self.speculate.removeprefix(EAGLE) or None if self.speculate.startswith(EAGLE) else None

    @property
    def most_drafts(self) -> int:
        """Drafts that a step verifies for one sequence at most; 0: none."""
        return 0

    def worker_sizes(self, device: str, full_step_tokens: int = FULL_STEP_TOKENS) -> WorkerSizes:
        """The sizes on "cpu" or "cuda", with the model's full_step_tokens."""
        return self.resolved(CPU_SIZES if device == "cpu" else CUDA_SIZES)

    def resolved(self, defaults: WorkerSizes) -> WorkerSizes:
        """`defaults` with what is given."""
        given = {each.name: getattr(self, each.name) for each in fields(defaults)}
        return replace(defaults, **{name: value for name, value in given.items() if value not in (None, ())})
