"""What a worker's process and another rank, or another stage, tell each other while they start, over the link between
the two."""

from __future__ import annotations

import msgspec


class ModelPart(msgspec.Struct, frozen=True, kw_only=True):
    """The model that a process loads its part of, as the worker's settings say. Which rank it is, is said elsewhere."""

    folder: str
    dtype: str
    kv_dtype: str
    load_format: str
    quantization: str | None
    max_model_len: int | None
    vocab_size: int
    stage: int = 0
    num_stages: int = 1
    max_loras: int = 0
    max_lora_rank: int = 0
    lora_room: tuple[str, ...] = ()
    draft: str = ""
    """The folder of an EAGLE-3 draft, whose layer lies behind the model's in the pool; empty: there is none."""


class SharedBytes(msgspec.Struct, frozen=True):
    """Memory of a process, as kvtransfer.blocks.memory.SharedFile describes it."""

    fd: int
    size_bytes: int
    nonce: bytes


class DeviceShare(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank or a stage that computes on a GPU needs besides; the worker's settings and sizes."""

    gpu: int
    max_num_seqs: int
    max_num_batched_tokens: int
    run_ahead: int
    deterministic: bool
    most_drafts: int
    block_tokens: int
    gpu_memory_utilization: float | None
    """None: the size of the pool is given."""
    entering: SharedBytes | None = None
    """Memory of the worker's process, through which steps enter a stage behind the first, and leave one before the
    last."""
    leaving: SharedBytes | None = None


class RankStart(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a rank: what it is, and the model that it loads its part of."""

    index: int
    count: int
    starter_pid: int
    name: str
    """In logs."""
    log_level: str
    peer_fds: dict[int, int]
    """By rank, the open end of the link to it."""
    memory: SharedBytes
    """Of the starter."""
    model: ModelPart
    threads: int
    device: DeviceShare | None = None
    """None: on a CPU."""


class PoolMade(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a rank, or a stage, that has loaded: where keys and values of all ranks lie."""

    pid: int
    """Whose memory it is."""
    memory: SharedBytes
    num_blocks: int
    block_tokens: int


class DeviceLoaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """From a rank that has loaded its part on a GPU."""

    exchange: bytes
    """CUDA IPC handle of the memory by which ranks exchange what a step needs."""
    bank: bytes
    """Of the memory of the slots of adapters; empty: there are none."""
    num_blocks: int
    """For which its GPU has room."""


class DevicePoolsMade(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a rank that has loaded: handles of all ranks, in order. Rank 0's process owns all pools."""

    pools: tuple[bytes, ...]
    exchanges: tuple[bytes, ...]
    num_blocks: int
    max_model_len: int


class DeviceStageLoaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """From a stage that has loaded its layers on a GPU."""

    num_blocks: int
    """For which its GPU has room; 0: their number is given."""


class DeviceStagePool(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a stage that has loaded its layers on a GPU. The first stage's process owns all pools."""

    pool: bytes
    """CUDA IPC handle of the memory of this stage's."""
    num_blocks: int
    max_model_len: int


class StageStart(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a stage: what it is, and the model that it loads its layers of."""

    starter_pid: int
    name: str
    """In logs."""
    log_level: str
    entering_fd: int
    """The open end of the link that it gets steps from, and of that to the next stage or, of the last, to the first."""
    leaving_fd: int
    model: ModelPart
    num_ranks: int
    """Processes that share the stage."""
    threads: int
    device: DeviceShare | None = None
    """None: on a CPU."""


class RankReady(msgspec.Struct, frozen=True, tag=True):
    """From a rank or a stage: it can join steps."""


class RankBeat(msgspec.Struct, frozen=True, tag=True):
    """From a rank or a stage that is ready, every BEAT_S: its process runs."""


BEAT_S = 0.5

RankMessage = (
    RankStart
    | StageStart
    | PoolMade
    | DeviceLoaded
    | DevicePoolsMade
    | DeviceStageLoaded
    | DeviceStagePool
    | RankReady
    | RankBeat
)
_decoder = msgspec.msgpack.Decoder(RankMessage)


def encode(message: RankMessage) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> RankMessage:
    return _decoder.decode(data)
