"""Decode attention over the paged pool, and the plan of its chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is made for Linux only")

from kernels.triton import decode_attention
from kernels.triton.decode_plan import TILE, DecodePlan, fixed_plan, split_plan
from tests.unit.kernels import kernel_checks as checks

WHOLE = DecodePlan(1, 256, 3, merges=False)
HALVES = DecodePlan(3, 64, 3, merges=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", [WHOLE, HALVES])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_dtypes_and_plans(device, dtype, plan, block_tokens):
    """Guards against tokens past the end that count, blocks of another sequence, and parts merged wrongly."""
    checks.check_decode_attention(device, dtype, checks.Heads(4, 2, 64), [1, 64, 150], block_tokens, plan)


@pytest.mark.parametrize("heads", [(1, 1, 64), (5, 1, 80), (8, 2, 96), (7, 1, 128), (16, 1, 256)])
@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
def test_shapes(device, heads, block_tokens):
    """Guards against groups and head dimensions that are no powers of two, and pages larger or smaller than a tile."""
    checks.check_decode_attention(device, torch.bfloat16, checks.Heads(*heads), [70, 129], block_tokens, HALVES)


@pytest.mark.parametrize("plan", [WHOLE, HALVES])
@pytest.mark.parametrize("window", [1, 40, 64, 100, 1000])
def test_window(device, plan, window):
    """Guards against a window that is off by one, and merged parts of chunks before it, which were never written."""
    checks.check_decode_attention(device, torch.float32, checks.Heads(2, 1, 64), [30, 150, 192], 16, plan, window)


def test_fixed_chunks_do_not_depend_on_the_batch(device):
    """Guards against a row whose bits change with what else is in the step: --deterministic rests on this."""
    heads, plans = checks.Heads(4, 1, 64), [fixed_plan(1, 1, 150, 132, 64), fixed_plan(200, 1, 700, 132, 64)]
    alone = checks.check_decode_attention(device, torch.bfloat16, heads, [150], 64, plans[0])
    # The same first query row and the same contents of blocks cannot be had of another pool: build one by hand.
    paged = checks.Paged.make(device, torch.bfloat16, heads, [150], 64)
    tables = torch.nn.functional.pad(paged.tables, (0, 8)).repeat(3, 1)
    query = checks.randn((1, 4, 64), torch.bfloat16, device).repeat(3, 1, 1)
    scratch = decode_attention.DecodeScratch.make(3, plans[1].num_splits, 4, 1, 64, device)
    out = checks.poison((3, 4, 64), torch.bfloat16, device)
    lengths = torch.tensor([7, 150, 0], dtype=torch.int32, device=device)
    decode_attention.decode_attention(query, paged.pool, 1, tables, lengths, plans[1], scratch, out)
    assert torch.equal(out[1], alone[0])
    assert bool(out[2].isnan().all()), "a row of length 0 is padding and stays as it was"


@settings(max_examples=300)
@given(st.integers(1, 512), st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 131072), st.integers(1, 200))
def test_a_plan_covers_the_longest_sequence(num_rows, kv_heads, max_tokens, num_sms):
    """Guards against tokens that no chunk holds, and chunks that hold none."""
    for plan in (
        split_plan(num_rows, kv_heads, max_tokens, num_sms),
        fixed_plan(num_rows, kv_heads, max_tokens, num_sms),
    ):
        assert plan.chunk_tokens % TILE == 0 and plan.num_splits * plan.chunk_tokens >= max_tokens
        assert (plan.num_splits - 1) * plan.chunk_tokens < max_tokens
        assert plan.merges or plan.num_splits == 1


def test_plans_that_were_measured_best():
    """Guards against a rule that drifts from the measured optima, with 8 key heads."""
    assert [split_plan(rows, 8, 1024, 132).num_splits for rows in (1, 8, 16, 20, 32, 64, 256)] == [16, 2, 1, 3, 1, 1, 1]
    assert [split_plan(rows, 8, 32768, 132).num_splits for rows in (1, 2, 8)] == [32, 32, 8]
    assert [split_plan(1, heads, 32768, 132).num_splits for heads in (1, 2, 4)] == [256, 128, 64]  # two programs each
