"""Guards the identity of blocks: different contexts never share KV, equal ones always do."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.blocks.hashing import (
    block_hashes,
    cache_salt,
    extend,
    namespace_digest,
    root_hash,
    tokenizer_fingerprint,
)
from baton.kvtransfer.blocks.layout import KVLayout
from baton.node.errors import SettingsError

LAYOUT = KVLayout.of_model(num_layers=4, kv_heads=2, head_dim=64, block_tokens=16, dtype="bfloat16")
FIELDS = dict(
    model_fingerprint=b"m" * 32,
    layout=LAYOUT,
    weight_dtype="bfloat16",
    rope_fingerprint=b"r" * 32,
    tokenizer_fingerprint=b"t" * 32,
)
NAMESPACE = namespace_digest(**FIELDS)
ROOT = root_hash(NAMESPACE)

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)
small_tokens = st.lists(st.integers(0, 3), max_size=24)


# ---- chain ----------------------------------------------------------------------------------------------------------


def test_the_chain_follows_the_format() -> None:
    """Guards blocks on disk, which a changed byte order or width would make unreachable."""
    first = hashlib.sha256(ROOT + struct.pack("<3I", 1, 2, 0xFFFFFFFF)).digest()
    second = hashlib.sha256(first + struct.pack("<3I", 4, 5, 6)).digest()
    assert block_hashes(ROOT, [1, 2, 0xFFFFFFFF, 4, 5, 6, 7, 8], 3) == (first, second)


@given(tokens, tokens, st.integers(1, 9))
def test_a_prefix_has_a_prefix_of_the_hashes(head: list[int], tail: list[int], block_tokens: int) -> None:
    whole = block_hashes(ROOT, head + tail, block_tokens)
    part = block_hashes(ROOT, tuple(head), block_tokens)
    assert whole[: len(part)] == part
    assert len(whole) == (len(head) + len(tail)) // block_tokens


@given(small_tokens, small_tokens, st.integers(1, 5))
def test_hashes_are_equal_exactly_as_far_as_the_tokens_are(a: list[int], b: list[int], block_tokens: int) -> None:
    for index, (x, y) in enumerate(
        zip(block_hashes(ROOT, a, block_tokens), block_hashes(ROOT, b, block_tokens), strict=False)
    ):
        end = (index + 1) * block_tokens
        assert (x == y) == (a[:end] == b[:end])


@given(tokens, st.integers(1, 9))
def test_extending_block_by_block_gives_the_same_chain(ids: list[int], block_tokens: int) -> None:
    parent, chain = ROOT, []
    for start in range(0, len(ids) - block_tokens + 1, block_tokens):
        parent = extend(parent, ids[start : start + block_tokens])
        chain.append(parent)
    assert tuple(chain) == block_hashes(ROOT, ids, block_tokens)


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_a_token_that_is_no_u32_is_refused_and_never_wrapped(bad: int) -> None:
    with pytest.raises(ValueError):
        block_hashes(ROOT, [0, bad], 2)
    with pytest.raises(ValueError):
        extend(ROOT, [bad])


def test_no_tokens_a_block_is_refused() -> None:
    with pytest.raises(ValueError):
        block_hashes(ROOT, [1], 0)


# ---- namespace, tenant, adapter -------------------------------------------------------------------------------------


def test_every_field_of_the_namespace_counts() -> None:
    """Guards against sharing KV between incompatible models: every field must change the digest."""
    changes = [
        dict(model_fingerprint=b"M" * 32),
        dict(layout=replace(LAYOUT, block_tokens=32)),
        dict(layout=replace(LAYOUT, dtype="float16")),
        dict(weight_dtype="float16"),
        dict(layout=replace(LAYOUT, total_units=4)),
        dict(rope_fingerprint=b"R" * 32),
        dict(tokenizer_fingerprint=b"T" * 32),
    ]
    digests = {NAMESPACE} | {namespace_digest(**{**FIELDS, **change}) for change in changes}
    assert len(digests) == len(changes) + 1
    assert all(len(digest) == 32 for digest in digests)


@given(st.binary(max_size=6), st.binary(max_size=6), st.binary(max_size=6), st.binary(max_size=6))
def test_fields_never_run_into_each_other(a: bytes, b: bytes, c: bytes, d: bytes) -> None:
    """Guards against equal hashes of ("ab", "c") and ("a", "bc"): lengths are hashed with the values."""
    same = (a, b) == (c, d)
    left = namespace_digest(**{**FIELDS, "rope_fingerprint": a, "tokenizer_fingerprint": b})
    right = namespace_digest(**{**FIELDS, "rope_fingerprint": c, "tokenizer_fingerprint": d})
    assert (left == right) == same
    assert (root_hash(NAMESPACE, salt=a, lora=b) == root_hash(NAMESPACE, salt=c, lora=d)) == same


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=40), st.binary(min_size=1, max_size=40), small_tokens)
def test_another_namespace_or_salt_shares_no_block(ns: bytes, salt: bytes, other: bytes, ids: list[int]) -> None:
    mine = set(block_hashes(root_hash(ns, salt), ids, 2))
    foreign_ns = bytes([ns[0] ^ 1]) + ns[1:]
    assert not mine & set(block_hashes(root_hash(foreign_ns, salt), ids, 2))
    assert not mine & set(block_hashes(root_hash(ns, salt + other), ids, 2))


def test_concatenation_of_salt_and_adapter_is_unambiguous() -> None:
    assert root_hash(NAMESPACE, salt=b"ab", lora=b"c") != root_hash(NAMESPACE, salt=b"b", lora=b"ca")
    assert root_hash(NAMESPACE, salt=b"x") != root_hash(NAMESPACE, lora=b"x")


def test_a_salt_is_a_digest_of_tenant_and_client() -> None:
    """Guards tenants: no client reaches another's cache by the characters that it chooses."""
    pairs = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc"), ("a", "b"), ("", "\0"), ("", "\ud800")]
    salts = [cache_salt(client, tenant) for tenant, client in pairs]
    assert len(set(salts)) == len(pairs) and {len(salt) for salt in salts[1:]} == {32}
    assert root_hash(NAMESPACE, cache_salt("")) == ROOT, "without a salt, KV that exists stays reachable"


def test_a_shortened_namespace_is_refused() -> None:
    with pytest.raises(ValueError):
        root_hash(NAMESPACE[:16])


def test_ranks_of_a_model_share_its_namespace() -> None:
    """Guards hits between workers of different tensor-parallel sizes, which hold the same units."""
    rank = replace(LAYOUT, first_unit=1, num_units=1)
    assert namespace_digest(**{**FIELDS, "layout": rank}) == NAMESPACE


def test_the_namespace_is_the_same_in_another_process() -> None:
    """Guards against process-dependent inputs such as hash seeds, which would make every worker incompatible."""
    code = (
        "from baton.kvtransfer.blocks.hashing import *; from baton.kvtransfer.blocks.layout import KVLayout;"
        "import sys; assert 'torch' not in sys.modules, 'the proxy must not load torch';"
        "l = KVLayout(4, 0, 2, 2, 64, 16, 'bfloat16');"
        "print(namespace_digest(model_fingerprint=b'm'*32, layout=l, weight_dtype='bfloat16',"
        "rope_fingerprint=b'r'*32, tokenizer_fingerprint=b't'*32).hex())"
    )
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == NAMESPACE.hex(), done.stderr


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def test_the_tokenizers_digest_covers_content_and_name(tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / name for name in "abcd")
    for folder in (a, b, c, d):
        folder.mkdir()
    (a / "tokenizer.json").write_text("{}")
    (b / "tokenizer.json").write_text("{}")
    (b / "model.safetensors").write_text("weights are not text")
    (c / "tokenizer.json").write_text("{ }")
    (d / "vocab.json").write_text("{}")
    assert tokenizer_fingerprint(a) == tokenizer_fingerprint(str(b))
    assert len({tokenizer_fingerprint(folder) for folder in (a, c, d)}) == 3


def test_a_folder_that_cannot_be_read_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        tokenizer_fingerprint(tmp_path / "nowhere")
