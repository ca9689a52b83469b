"""Latent attention: its norms and rotations, decoding over latents, and prompts over keys and values made of them."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.decode_plan import DecodePlan, fixed_plan
from baton.tests.unit.kernels import latent_checks as checks

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PIECES, SHARED = DecodePlan(9, 3, chunk_tokens=64), DecodePlan(20, 3, splits=4)


@pytest.mark.parametrize(
    ("dtype", "query_rank", "partials", "interleaved"),
    [(FP32, 0, 0, True), (FP16, 24, 0, True), (BF16, 0, 2, True), (FP32, 24, 2, True), (BF16, 0, 0, False)],
)
def test_norms_and_rotations(device, dtype, query_rank, partials, interleaved):
    """Guards against pairs taken from the wrong places, a norm over the rotated key, and padding that is written."""
    checks.check_latent_write(device, dtype, checks.TINY, query_rank, partials, interleaved)


@pytest.mark.parametrize(
    ("dtype", "plan", "block_tokens"), [(FP32, PIECES, 16), (BF16, SHARED, 64), (FP16, PIECES, 64)]
)
def test_decode(device, dtype, plan, block_tokens):
    """Guards against tokens past the end that count, parts merged wrongly, and rows of padding that are written."""
    checks.check_latent_decode(device, dtype, checks.TINY, [1, 0, 150], block_tokens, plan)


@pytest.mark.parametrize("heads", [1, 20])
def test_numbers_of_heads(device, heads):
    """Guards against heads that do not fill a tile, whose parts would overwrite another's."""
    shape = checks.Latent(heads, 24, 16, 32, 24)
    checks.check_latent_decode(device, torch.bfloat16, shape, [70, 1, 65, 2, 3], 64, DecodePlan(12, 3, chunk_tokens=64))


def test_fixed_chunks_do_not_depend_on_the_batch(device):
    """Guards against a row whose bits change with what else is in the step: --deterministic rests on this."""
    shape = checks.TINY
    alone = checks.Step.make(device, torch.bfloat16, shape, [150], 64)
    query = checks.randn((1, shape.heads, 32), torch.bfloat16, device)
    out = checks.decode(alone, shape, query, fixed_plan(1, 1, 150, 132, 64))
    tables = torch.nn.functional.pad(alone.tables, (0, 8)).repeat(6, 1)
    lengths = torch.tensor([7, 150, 0, 64, 99, 150], dtype=torch.int32, device=device)
    among = checks.Step(alone.pool, tables, lengths, alone.kv_up)
    outs = checks.decode(among, shape, query.repeat(6, 1, 1), fixed_plan(6, 1, 700, 132, 64))
    assert torch.equal(outs[1], out[0]) and torch.equal(outs[5], out[0])


@pytest.mark.parametrize(("dtype", "block_tokens", "slice_tokens"), [(FP32, 16, 512), (BF16, 64, 64)])
def test_prompts(device, dtype, block_tokens, slice_tokens):
    """Guards against a causal mask off by one, sequences that read each other's context, and a state that is lost from
    slice to slice."""
    checks.check_latent_prefill(device, dtype, checks.TINY, [40, 130, 1], [40, 20, 1], block_tokens, slice_tokens)


def test_a_prompt_does_not_depend_on_chunks_and_slices(device):
    """Guards against a token whose bits depend on how its prompt was cut."""
    shape, length = checks.TINY, 150
    step = checks.Step.make(device, torch.bfloat16, shape, [length], 64)
    query = checks.randn((length, shape.heads, 32), torch.bfloat16, device)
    whole = checks.prefill(step, shape, query, [length], 512)
    last = checks.prefill(step, shape, query[-20:].contiguous(), [20], 64)
    assert torch.equal(whole[-20:], last)


@pytest.mark.parametrize(
    ("dtype", "plan", "slice_tokens", "scaled"),
    [(FP32, SHARED, 128, True), (BF16, PIECES, 512, False)],
)
def test_what_adapters_change_of_keys_and_values(device, dtype, plan, slice_tokens, scaled):
    """Guards against another sequence's or head's pair, key's for values, lower ranks and none, parts merged otherwise,
    a slice that begins within a sequence, and tokens in front of those of prompts."""
    lengths, new = [70, 1, 150, 40], [70, 1, 20, 40]
    checks.check_latent_pairs(device, dtype, checks.TINY, lengths, new, 64, slice_tokens, plan, [32, 0, 16], 32, scaled)
