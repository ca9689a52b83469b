"""The checks of tests/unit/kernels on a GPU, with the shapes of served models and launches chained with PDL.

Run them in a separate process or with tests/unit/kernels, which then run on the GPU as well.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import DenseLinear
from baton.kernels.triton.decode_plan import DecodePlan, fixed_plan, split_plan
from baton.kernels.triton.linear_policy import FASTEST, GATE_UP_8B, INVARIANT, O_8B, fastest
from baton.kernels.triton.prefill_attention import block_m
from baton.models.cuda.products import Products, invariant
from baton.models.cuda.products.dense import DenseProducts
from baton.tests.unit.kernels import kernel_checks as checks

pytestmark = pytest.mark.gpu

GPU = "cuda"
BF16 = torch.bfloat16
LLAMA_8B, QWEN_05B = checks.Heads(32, 8, 128), checks.Heads(14, 2, 64)


@pytest.mark.parametrize("pdl", [False, True])
def test_sinks(pdl):
    """Guards against a sink that counts once a part of a sequence, or of another head; heads as in gpt-oss."""
    heads, lengths = checks.Heads(64, 8, 64), [1, 64, 700, 333, 1024]
    for plan in (DecodePlan(9, 5, chunk_tokens=1024), DecodePlan(40, 5, chunk_tokens=64)):
        checks.check_decode_attention(GPU, BF16, heads, lengths, 64, plan, None, pdl, with_sinks=True)
        checks.check_decode_attention(GPU, BF16, heads, lengths, 64, plan, 128, pdl, with_sinks=True)
        checks.check_decode_attention(GPU, BF16, heads, lengths, 64, plan, None, pdl, "token", with_sinks=True)
    for window in (None, 128):
        ragged = [(300, 0), (1, 70), (17, 500), (128, 64)]
        checks.check_prefill_attention(GPU, BF16, heads, ragged, 64, 128, window, pdl, with_sinks=True)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_and_activation(dtype, pdl):
    checks.check_rms_norm(GPU, dtype, 300, 4096, pdl)
    for partials in (0, 2, 4):
        checks.check_add_rms_norm(GPU, dtype, 65, 4096, partials, pdl)
    checks.check_silu_and_mul(GPU, dtype, 65, 14336, pdl)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("heads", [LLAMA_8B, QWEN_05B, checks.Heads(32, 32, 96)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_write(heads, normed, pdl):
    checks.check_rope_and_write(GPU, BF16, heads, 500, 64, 0, normed, pdl)
    checks.check_rope_and_write(GPU, BF16, heads, 33, 16, 2, normed, pdl)
    checks.check_rope_and_write(GPU, BF16, heads, 33, 16, 2, normed, pdl, heads.dim * 3 // 4)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("heads", [LLAMA_8B, QWEN_05B, checks.Heads(32, 8, 96), checks.Heads(16, 1, 256)])
def test_decode_attention(heads, block_tokens, pdl):
    lengths = [1, 63, 64, 700, 333, 1024]
    for plan in (
        DecodePlan(9, 5, chunk_tokens=1024),
        DecodePlan(70, 5, splits=9),
        split_plan(6, heads.key, 132),
        fixed_plan(6, heads.key, 1024, 132, 64),
    ):
        checks.check_decode_attention(GPU, BF16, heads, lengths, block_tokens, plan, None, pdl)
        checks.check_decode_attention(GPU, BF16, heads, lengths, block_tokens, plan, 100, pdl)


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_the_depth_of_the_pipeline_does_not_change_bits(block_tokens):
    """Guards the fixed plan against results that depend on the number of rows."""
    lengths = [1, 63, 64, 700, 333, 1024]
    outs = [
        checks.check_decode_attention(
            GPU, BF16, LLAMA_8B, lengths, block_tokens, DecodePlan(24 + more, stages, chunk_tokens=256), None, pdl
        )
        for stages in (3, 5, 7, 9)
        for more in (0, 5)
        for pdl in (False, True)
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("heads", [LLAMA_8B, QWEN_05B, checks.Heads(32, 8, 96), checks.Heads(16, 1, 256)])
def test_prefill_attention(heads, block_tokens, pdl):
    ragged, tokens = [(300, 64), (1, 1000), (129, 0), (512, 77), (64, 0)], block_m(heads.dim)
    for window in (None, 100):
        checks.check_prefill_attention(GPU, BF16, heads, ragged, block_tokens, tokens, window, pdl)
    checks.check_chunks_do_not_matter(GPU, BF16, heads, block_tokens, tokens)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [LLAMA_8B, checks.Heads(5, 1, 128)])
def test_hopper_prefill_attention(heads, block_tokens, persistent):
    from baton.kernels.triton.prefill_gluon import is_available

    if not is_available(torch.cuda.get_device_capability()):
        pytest.skip("needs Hopper and a Triton whose Gluon is known")
    ragged = [(300, 64), (1, 1000), (129, 0), (512, 77), (64, 0), (2000, 3000)]
    checks.check_prefill_gluon(heads, ragged, block_tokens, persistent)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 256, 256), (333, 1096, 512), (1000, 6144, 4096), (2049, 4096, 1024)])
def test_hopper_gated_product(rows, n, k):
    """One tile, tiles cut by the rows and by the columns, and several for each program."""
    from baton.kernels.triton.prefill_gluon import is_available

    if not is_available(torch.cuda.get_device_capability()):
        pytest.skip("needs Hopper and a Triton whose Gluon is known")
    checks.check_gated_product(rows, n, k)


@pytest.mark.parametrize("rows", [1023, 1024])
def test_many_rows_use_the_gluon_kernel(rows):
    """Guards the choice by the table, and equality with the cuBLAS result."""
    products = DenseProducts(fastest, rows, (GATE_UP_8B,), BF16, GPU)
    asked, by_gluon = [], products._by_gluon
    products._by_gluon = by_gluon and (lambda *args: asked.append(args) or by_gluon(*args))
    x, weight = checks.randn((rows, 4096), BF16, GPU), checks.randn((28672, 4096), BF16, GPU, 1) / 64
    out = checks.poison((rows, 14336), BF16, GPU)
    products.gated(DenseLinear(weight), x, out, pdl=False)
    gate, up = (x @ weight.t()).float().chunk(2, -1)
    assert checks.error(out, torch.nn.functional.silu(gate) * up) < 6e-3
    assert len(asked) == (by_gluon is not None and rows == 1024)


def test_blocks():
    checks.check_blocks(GPU, BF16, (20, 32, 2, 64, 8, 128), 12)
    for step_words, row_words in ((2048, 2112), (4096, 2048), (1024, 8200)):
        checks.check_rows(GPU, step_words, row_words)
    checks.check_blocks(GPU, torch.float32, (20, 5, 2, 16, 2, 80), 20)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampling(dtype, pdl):
    checks.check_argmax(GPU, dtype, 70, 128256, pdl)
    checks.check_draw(GPU, dtype, 20, 151936, pdl)


def test_random_numbers():
    checks.check_uniforms(GPU, 100)
    checks.check_small_uniforms(GPU)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 16, 23, 64, 100, 128])
def test_linear(rows, pdl):
    """Every entry of the table, on the shapes that it was tuned for, with rows that do not fill its tile."""
    for shape in FASTEST[1]:
        n, k, fused, tiles = shape.outputs, shape.inputs, shape.fused, fastest(rows, shape)
        if tiles is not None:
            checks.check_linear(GPU, BF16, rows, n, k, tiles, fused, not fused, pdl)


def test_the_invariant_table_gives_a_row_the_same_bits_for_any_number_of_rows():
    """Guards --deterministic: the batch must not change a row's bits."""
    from baton.kernels.triton.linear import linear

    largest = max(INVARIANT)
    for key in INVARIANT[largest]:
        n, k, fused = key.outputs, key.inputs, key.fused
        x, weight = checks.randn((largest, k), BF16, GPU), torch.randn(2 * n if fused else n, k, device=GPU).to(BF16)
        outs = {}
        for rows, entries in INVARIANT.items():
            tiles = entries[key]
            shape = (tiles.splits, rows, n) if tiles.splits > 1 else (rows, n)
            outs[rows] = checks.poison(shape, torch.float32 if tiles.splits > 1 else BF16, GPU)
            linear(x[:rows], weight, None, tiles, outs[rows], fused=fused)
        for rows, out in outs.items():
            assert torch.equal(out, outs[largest][..., :rows, :]), (n, k, rows)


def test_an_invariant_product_in_one_part_has_the_same_bits_for_any_number_of_rows():
    """Guards the logits of models whose vocabulary size equals the outputs of a split product."""
    counts = (1, 16, 33, 256, 300)
    n, k = O_8B.outputs, O_8B.inputs
    products, x = Products(invariant, counts[-1], [O_8B], BF16, GPU), checks.randn((counts[-1], k), BF16, GPU)
    weights = DenseLinear(torch.randn(n, k, device=GPU).to(BF16), None)
    outs = {rows: checks.poison((rows, n), BF16, GPU) for rows in counts}
    for rows, out in outs.items():
        products.whole(weights, x[:rows], out, pdl=False)
    for rows, out in outs.items():
        assert torch.equal(out, outs[counts[-1]][:rows]), rows
