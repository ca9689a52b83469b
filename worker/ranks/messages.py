"""What rank 0 and another rank tell each other while they start, over the link between the two."""

from __future__ import annotations

import msgspec


class SharedBytes(msgspec.Struct, frozen=True):
    """Memory of rank 0's process, as kvtransfer.blocks.memory.SharedFile describes it."""

    fd: int
    size_bytes: int
    nonce: bytes


class RankStart(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a rank: what it is, and the model that it loads its part of. The settings are the worker's."""

    index: int
    count: int
    starter_pid: int
    name: str
    """In logs."""
    log_level: str
    peer_fds: dict[int, int]
    """By rank, the open end of the link to it."""
    memory: SharedBytes
    vocab_size: int
    folder: str
    dtype: str
    kv_dtype: str
    load_format: str
    quantization: str | None
    max_model_len: int | None
    threads: int


class PoolMade(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a rank that has loaded: where keys and values of all ranks lie."""

    memory: SharedBytes
    num_blocks: int
    block_tokens: int


class RankReady(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it can join steps."""


class RankBeat(msgspec.Struct, frozen=True, tag=True):
    """From a rank that is ready, every BEAT_S: its process runs."""


BEAT_S = 0.5

RankMessage = RankStart | PoolMade | RankReady | RankBeat
_decoder = msgspec.msgpack.Decoder(RankMessage)


def encode(message: RankMessage) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> RankMessage:
    return _decoder.decode(data)
