"""Guards the arithmetic that both ends of a transfer rely on: a byte off here is silent corruption there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.blocks.layout import DTYPE_BYTES, KVLayout

LLAMA_8B = KVLayout(num_layers=32, kv_heads=8, head_dim=128, block_tokens=64, dtype="bfloat16")


def test_a_block_of_the_8b_model_is_8_mib() -> None:
    assert LLAMA_8B.block_bytes == 8 << 20
    assert LLAMA_8B.token_bytes == 128 << 10


def test_dtype_sizes_are_torchs_own() -> None:
    for name, size_bytes in DTYPE_BYTES.items():
        assert torch.empty(1, dtype=getattr(torch, name)).element_size() == size_bytes, name


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.sampled_from(sorted(DTYPE_BYTES)))
def test_shape_and_bytes_agree(layers: int, heads: int, dim: int, tokens: int, dtype: str) -> None:
    layout = KVLayout(layers, heads, dim, tokens, dtype)
    tensor = torch.empty(layout.shape(3), dtype=getattr(torch, dtype), device="meta")
    assert tensor.numel() * tensor.element_size() == 3 * layout.block_bytes


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_blocks_for_is_the_least_number_that_holds_the_tokens(num_tokens: int, block_tokens: int) -> None:
    blocks = KVLayout(1, 1, 1, block_tokens, "float32").blocks_for(num_tokens)
    assert blocks * block_tokens >= num_tokens
    assert (blocks - 1) * block_tokens < num_tokens


@pytest.mark.parametrize("field", ["num_layers", "kv_heads", "head_dim", "block_tokens"])
def test_a_dimension_below_one_is_refused(field: str) -> None:
    good = dict(num_layers=1, kv_heads=1, head_dim=1, block_tokens=1)
    with pytest.raises(ValueError, match=field):
        KVLayout(**{**good, field: 0}, dtype="float32")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        KVLayout(1, 1, 1, 1, "int3")


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(ValueError):
        LLAMA_8B.blocks_for(-1)


def test_every_field_is_in_the_fingerprint() -> None:
    base = KVLayout(2, 2, 2, 2, "float16")
    others = [
        KVLayout(3, 2, 2, 2, "float16"),
        KVLayout(2, 3, 2, 2, "float16"),
        KVLayout(2, 2, 3, 2, "float16"),
        KVLayout(2, 2, 2, 3, "float16"),
        KVLayout(2, 2, 2, 2, "bfloat16"),
    ]
    assert len({layout.fingerprint_fields() for layout in (base, *others)}) == 6
