"""The header before every block on disk, and the check of both. A record is its header and the block's bytes,
which are the units of all heads in order, however many ranks have written them.

    magic "BKV1" | u32 format | namespace, first 16 bytes | key, 32 | u64 payload bytes | u64 tick | digest, 16 | check

All little-endian. The digest is the caller's own, of the payload, and is given back as it came. The check is the
xxh3-128 of the header before it and the payload, so that a flipped bit anywhere shows. It is taken of the bytes that
were copied out, after the copy: what the caller has is what was checked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from baton.kvtransfer.store.disk.base import DIGEST_BYTES, KEY_BYTES, Miss
from baton.kvtransfer.store.disk.records import RecordFault
from baton.node.errors import SettingsError

MAGIC = b"BKV1"
FORMAT = 3
NAMESPACE_PREFIX_BYTES = 16
_FIELDS = struct.Struct(f"<4sI{NAMESPACE_PREFIX_BYTES}s{KEY_BYTES}sQQ{DIGEST_BYTES}s")
_CHECK_BYTES = 16
HEADER_BYTES = _FIELDS.size + _CHECK_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says of its record; nothing of it is verified but that it is one of this namespace."""

    key: bytes
    payload_bytes: int
    tick: int
    digest: bytes


def check_namespace(namespace: bytes) -> None:
    if len(namespace) != KEY_BYTES:
        raise SettingsError(f"a namespace has {KEY_BYTES} bytes, not {len(namespace)}")


def pack_header(namespace: bytes, key: bytes, tick: int, payload: memoryview, digest: bytes) -> bytes:
    """The header [HEADER_BYTES] of a record of `payload`."""
    fields = _FIELDS.pack(MAGIC, FORMAT, namespace[:NAMESPACE_PREFIX_BYTES], key, payload.nbytes, tick, digest)
    return fields + _check(fields, payload)


def parse_header(header: bytes, namespace: bytes) -> Header:
    """Raises RecordFault: cut off, no header of this format, or of another namespace."""
    if len(header) < HEADER_BYTES:
        raise RecordFault(Miss.TRUNCATED)
    magic, version, prefix, key, payload_bytes, tick, digest = _FIELDS.unpack_from(header)
    if magic != MAGIC or version != FORMAT:
        raise RecordFault(Miss.CORRUPT)
    if prefix != namespace[:NAMESPACE_PREFIX_BYTES]:
        raise RecordFault(Miss.FOREIGN)
    return Header(key, payload_bytes, tick, digest)


def check_record(header: bytes, payload: memoryview, namespace: bytes, key: bytes) -> bytes:
    """The digest that came with it; RecordFault unless `payload` is, bit for bit, what was stored under `key`."""
    parsed = parse_header(header, namespace)
    if parsed.key != key or parsed.payload_bytes != payload.nbytes:
        raise RecordFault(Miss.CORRUPT)
    if _check(header[: _FIELDS.size], payload) != header[_FIELDS.size : HEADER_BYTES]:
        raise RecordFault(Miss.CORRUPT)
    return parsed.digest


def _check(fields: bytes, payload: memoryview) -> bytes:
    state = xxhash.xxh3_128(fields)
    state.update(payload)
    return state.digest()
