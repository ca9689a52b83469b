"""Guards the layout arithmetic that both ends of a transfer share: an error of one byte is silent corruption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.blocks.layout import DTYPE_BYTES, KVLayout
from baton.kvtransfer.blocks.views import kv_tensors

LLAMA_8B = KVLayout.of_model(num_layers=32, kv_heads=8, head_dim=128, block_tokens=64, dtype="bfloat16")


def test_a_block_of_the_8b_model_is_8_mib() -> None:
    assert LLAMA_8B.block_bytes == 8 << 20
    assert LLAMA_8B.unit_bytes == 1 << 20 and LLAMA_8B.layer_bytes == 32 << 10


def test_dtype_sizes_are_torchs_own() -> None:
    for name, size_bytes in DTYPE_BYTES.items():
        assert torch.empty(1, dtype=getattr(torch, name)).element_size() == size_bytes, name


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.sampled_from(sorted(DTYPE_BYTES)))
def test_shape_and_bytes_agree(layers: int, heads: int, dim: int, tokens: int, dtype: str) -> None:
    layout = KVLayout(layers, 0, heads, heads, dim, tokens, dtype)
    tensor = torch.empty(layout.shape(3), dtype=getattr(torch, dtype), device="meta")
    assert tensor.numel() * tensor.element_size() == 3 * layout.block_bytes
    assert tensor.stride() == layout.strides


@pytest.mark.parametrize("padding_rows", [0, 1, 14])
def test_units_lie_equally_far_apart(padding_rows: int) -> None:
    """Guards the addressing of units: unit u of block b is row b * num_units + u of equal rows."""
    layout = KVLayout(3, 0, 2, 2, 5, 7, "float32", padding_rows * 20)
    flat = torch.arange(4 * layout.block_bytes // 4)
    pool = flat.as_strided(layout.shape(4), layout.strides)
    for block in range(4):
        for unit in range(2):
            first = (block * 2 + unit) * layout.unit_bytes // 4
            assert pool[block, unit].flatten().tolist() == list(range(first, first + 3 * layout.layer_bytes // 4))


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 12, 64, 128]), st.integers(1, 70))
def test_scales_follow_the_data_of_their_layer(layers: int, heads: int, dim: int, tokens: int) -> None:
    """Guards self-describing blocks: each scale is in the unit of its key or value, and no two tensors share a byte."""
    layout = KVLayout(layers, 0, heads, heads, dim, tokens, "float8_e4m3fn", scales="token")
    memory = torch.zeros(2 * layout.block_bytes, dtype=torch.uint8)
    tensors = kv_tensors(memory, layout, 2)
    assert tensors.scales is not None
    tensors.data.view(torch.uint8).fill_(1)
    tensors.scales.fill_(-1.0)
    units = memory.view(2 * heads, layers, layout.layer_bytes)
    end = layout.data_bytes + 2 * tokens * 4
    assert bool((units[..., : layout.data_bytes] == 1).all()) and not units[..., end:].any()
    assert bool((units[..., layout.data_bytes : end].contiguous().view(torch.float32) == -1.0).all())
    assert layout.layer_bytes - end < dim and layout.layer_bytes % dim == 0


def test_a_block_of_the_8b_model_in_fp8_is_half_as_large_and_a_33rd() -> None:
    fp8 = replace(LLAMA_8B, dtype="float8_e4m3fn", scales="token")
    assert fp8.block_bytes == (4 << 20) // 32 * 33 and fp8.layer_bytes == (16 << 10) + 512


@pytest.mark.parametrize("field", ["num_layers", "num_units", "total_units", "head_dim", "block_tokens"])
def test_a_dimension_below_one_is_refused(field: str) -> None:
    good = dict(num_layers=1, first_unit=0, num_units=1, total_units=1, head_dim=1, block_tokens=1)
    with pytest.raises(ValueError, match=field):
        KVLayout(**{**good, field: 0}, dtype="float32")


@pytest.mark.parametrize(("first", "count", "total"), [(-1, 1, 4), (4, 1, 4), (3, 2, 4), (0, 5, 4)])
def test_units_that_the_model_lacks_are_refused(first: int, count: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"of {total}"):
        KVLayout(1, first, count, total, 1, 1, "float32")


@pytest.mark.parametrize("padding_bytes", [-8, 6])
def test_padding_that_is_no_whole_rows_is_refused(padding_bytes: int) -> None:
    """Guards the kernels, which count rows."""
    with pytest.raises(ValueError, match="padding"):
        KVLayout(1, 0, 1, 1, 4, 1, "float16", padding_bytes)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        KVLayout(1, 0, 1, 1, 1, 1, "int3")


def test_all_that_shapes_a_unit_is_in_the_fingerprint() -> None:
    base = KVLayout(2, 0, 2, 2, 2, 2, "float16")
    others = [
        KVLayout(3, 0, 2, 2, 2, 2, "float16"),
        KVLayout(2, 0, 2, 3, 2, 2, "float16"),
        KVLayout(2, 0, 2, 2, 3, 2, "float16"),
        KVLayout(2, 0, 2, 2, 2, 3, "float16"),
        KVLayout(2, 0, 2, 2, 2, 2, "bfloat16"),
        KVLayout(2, 0, 2, 2, 2, 2, "float16", 4),
        KVLayout(2, 0, 2, 2, 2, 2, "float16", scales="token"),
        KVLayout(2, 0, 2, 2, 2, 2, "float16", scales="static", scales_digest="a"),
        KVLayout(2, 0, 2, 2, 2, 2, "float16", scales="static", scales_digest="b"),
    ]
    assert len({layout.fingerprint_fields() for layout in (base, *others)}) == 10


def test_scales_without_their_digest_are_refused() -> None:
    """Guards against blocks of two checkpoints whose static scales differ."""
    with pytest.raises(ValueError, match="static"):
        KVLayout(1, 0, 1, 1, 4, 1, "float8_e4m3fn", scales="static")
    with pytest.raises(ValueError, match="rows of 6 bytes"):
        KVLayout(1, 0, 1, 1, 6, 1, "float8_e4m3fn", scales="token")


def test_ranks_of_one_model_have_one_fingerprint() -> None:
    """Guards transfers between workers of different tensor-parallel sizes: a unit has the same bytes in all."""
    ranks = [KVLayout(2, first, count, 8, 64, 16, "float16") for first, count in ((0, 8), (0, 4), (4, 4), (7, 1))]
    assert len({layout.fingerprint_fields() for layout in ranks}) == 1
    assert len({layout.unit_bytes for layout in ranks}) == 1
