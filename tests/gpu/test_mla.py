"""Latent attention on a GPU: the checks of its kernels with the shapes of served models."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.decode_plan import DecodePlan, fixed_plan, split_plan
from baton.kernels.triton.latent_decode import head_tiles
from baton.tests.unit.kernels import latent_checks as checks

pytestmark = pytest.mark.gpu

GPU, BF16 = "cuda", torch.bfloat16
LITE, V3 = checks.LITE, checks.V3


@pytest.mark.parametrize(
    ("shape", "query_rank", "partials", "interleaved", "pdl"),
    [(LITE, 0, 0, True, True), (LITE, 0, 2, False, False), (V3, 1536, 0, True, True)],
)
def test_norms_and_rotations(shape, query_rank, partials, interleaved, pdl):
    checks.check_latent_write(GPU, BF16, shape, query_rank, partials, interleaved, pdl)


@pytest.mark.parametrize(
    ("shape", "block_tokens", "pdl"), [(LITE, 64, True), (LITE, 16, False), (LITE, 128, True), (V3, 64, True)]
)
def test_decode(shape, block_tokens, pdl):
    lengths = [1, 63, 64, 700, 0, 333, 1024]
    for plan in (
        DecodePlan(9, 5, chunk_tokens=1024),
        split_plan(7, head_tiles(shape.heads), 132),
        fixed_plan(7, head_tiles(shape.heads), 1024, 132, 64),
    ):
        checks.check_latent_decode(GPU, BF16, shape, lengths, block_tokens, plan, pdl)
    checks.check_latent_decode(GPU, BF16, shape, [3000], block_tokens, split_plan(1, 1, 132), pdl)


@pytest.mark.parametrize(
    ("shape", "block_tokens", "slice_tokens"), [(LITE, 64, 8192), (LITE, 64, 512), (LITE, 16, 512), (V3, 64, 512)]
)
def test_prompts(shape, block_tokens, slice_tokens):
    lengths, new = [1, 300, 1000, 64, 130], [1, 300, 129, 64, 1]
    checks.check_latent_prefill(GPU, BF16, shape, lengths, new, block_tokens, slice_tokens)


def test_bits_depend_on_neither_batch_nor_chunks():
    """Guards against a row whose bits change with what else is in the step: --deterministic rests on this."""
    step = checks.Step.make(GPU, BF16, LITE, [700], 64)
    query = checks.randn((1, LITE.heads, 192), BF16, GPU)
    out = checks.decode(step, LITE, query, fixed_plan(1, 1, 700, 132, 64))
    tables = torch.nn.functional.pad(step.tables, (0, 8)).repeat(40, 1)
    lengths = torch.tensor([1 + 17 * row for row in range(39)] + [700], dtype=torch.int32, device=GPU)
    among = checks.Step(step.pool, tables, lengths, step.kv_up)
    assert torch.equal(checks.decode(among, LITE, query.repeat(40, 1, 1), fixed_plan(40, 1, 700, 132, 64))[39], out[0])
    query = checks.randn((700, LITE.heads, 192), BF16, GPU)
    whole = checks.prefill(step, LITE, query, [700], 8192)
    last = checks.prefill(step, LITE, query[-100:].contiguous(), [100], 512)
    assert torch.equal(whole[-100:], last)
