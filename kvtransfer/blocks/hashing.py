"""The identity of blocks: what two nodes must agree on before one may use the other's KV. No torch: the proxy uses it.

    namespace   SHA-256 over a typed, length-prefixed record of everything that makes KV bytes compatible
    salt        SHA-256(len(tenant) tenant || len(client salt) client salt), or empty where both are
    root        SHA-256("kvblk1" || namespace || len(lora) lora || len(salt) salt)
    block i     SHA-256(block i-1, or root || its tokens as little-endian u32)

All are 32 bytes everywhere (wire, dictionaries, disk), never shortened: a collision would show one tenant another's
context. Lengths and types are hashed with the values, so no two different records give the same bytes. Only full blocks
have a hash. xxh3 finds corruption (pool.py) and never names anything.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec

from baton.kvtransfer.blocks.layout import KVLayout
from baton.node.errors import SettingsError
from baton.node.model_folder import MAX_TOKENIZER_BYTES, checked_size

FORMAT_VERSION = 2
HASH_BYTES = 32

_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def namespace_digest(
    *,
    model_fingerprint: bytes,
    layout: KVLayout,
    weight_dtype: str,
    rope_fingerprint: bytes,
    tokenizer_fingerprint: bytes,
) -> bytes:
    """32 bytes that are equal exactly if KV of the one can be used by the other, whatever units each of them holds.

    The record is a MessagePack array, which writes type and length of each item before it (bytes and text are different
    types, integers have one shortest form), so equal bytes mean equal fields.
    """
    record = (
        "kvns",
        FORMAT_VERSION,
        bytes(model_fingerprint),
        list(layout.fingerprint_fields()),
        weight_dtype,
        bytes(rope_fingerprint),
        bytes(tokenizer_fingerprint),
    )
    return hashlib.sha256(msgspec.msgpack.encode(record)).digest()


def tokenizer_fingerprint(folder: str | Path) -> bytes:
    """32 bytes over the tokenizer files of a Hugging Face model folder, by name and content.

    A folder without any gives the fingerprint of "none" (a worker with dummy weights needs no text).
    Raises SettingsError if the folder or one of the files cannot be read.
    """
    folder = Path(folder)
    try:
        present = {entry.name for entry in folder.iterdir()}
        files = [(name, _file_digest(folder / name)) for name in _TOKENIZER_FILES if name in present]
    except OSError as error:
        raise SettingsError(f"cannot read the tokenizer in {folder}: {error}") from error
    return hashlib.sha256(msgspec.msgpack.encode(("tokenizer", FORMAT_VERSION, files))).digest()


def cache_salt(client_salt: str, tenant: str = "") -> bytes:
    """The salt of a root for what a client and its tenant chose; 32 bytes, or empty where neither is given.

    A digest with lengths: no choice of characters leads into the cache of another pair.
    """
    if not (client_salt or tenant):
        return b""
    parts = (each.encode(errors="surrogatepass") for each in (tenant, client_salt))
    return hashlib.sha256(b"".join(map(_prefixed, parts))).digest()


def root_hash(namespace: bytes, salt: bytes = b"", lora: bytes = b"") -> bytes:
    """The parent of every first block in `namespace`, for one `cache_salt` and one adapter (digest of the LoRA)."""
    if len(namespace) != HASH_BYTES:
        raise ValueError(f"a namespace has {HASH_BYTES} bytes, not {len(namespace)}")
    return hashlib.sha256(b"kvblk1" + namespace + _prefixed(lora) + _prefixed(salt)).digest()


def block_hashes(root: bytes, token_ids: Sequence[int], block_tokens: int) -> tuple[bytes, ...]:
    """The hashes of the full blocks of `token_ids`; tokens after the last full block have none.

    Raises ValueError if a token is no u32.
    """
    if block_tokens < 1:
        raise ValueError(f"{block_tokens} tokens a block")
    num_tokens = len(token_ids) // block_tokens * block_tokens
    raw = _raw(token_ids[:num_tokens])
    stride = block_tokens * 4
    sha256, parent, hashes = hashlib.sha256, root, []
    for start in range(0, len(raw), stride):
        parent = sha256(parent + raw[start : start + stride]).digest()
        hashes.append(parent)
    return tuple(hashes)


def extend(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of one more full block after `parent` (a block's hash or the root)."""
    return hashlib.sha256(parent + _raw(tokens)).digest()


def _raw(token_ids: Sequence[int]) -> bytes:
    """Tokens as little-endian u32, one after the other."""
    try:
        words = array("I", token_ids)
    except OverflowError as error:
        raise ValueError(f"a token id is no unsigned 32-bit number: {error}") from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _prefixed(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value


def _file_digest(path: Path) -> bytes:
    checked_size(path, MAX_TOKENIZER_BYTES)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
