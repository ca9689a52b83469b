"""Causal attention of new tokens over the paged pool."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.prefill_attention import work_list
from baton.tests.unit.kernels import kernel_checks as checks

RAGGED = [(40, 0), (1, 70), (17, 50), (32, 64)]  # new tokens, cached tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_ragged_batches_with_cached_prefixes(device, dtype, block_tokens):
    """Guards against tokens that see the future, a prefix left out, and rows that touch a neighbour's tokens."""
    checks.check_prefill_attention(device, dtype, checks.Heads(2, 1, 32), RAGGED, block_tokens, 32)


@pytest.mark.parametrize("heads", [(2, 2, 64), (3, 1, 80), (2, 1, 96), (4, 2, 128), (1, 1, 256)])
@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
def test_shapes(device, heads, block_tokens):
    """Guards against head dimensions that are no powers of two, and pages larger or smaller than a tile."""
    checks.check_prefill_attention(device, torch.bfloat16, checks.Heads(*heads), [(20, 50)], block_tokens, 16)


@pytest.mark.parametrize("window", [None, 20])
def test_scores_within_bounds(device, window):
    """Guards against bounds of scores that a scale, a mask or the other base of the exponent has changed before."""
    rule, heads = checks.ScoreRule(0.4, 1.5), checks.Heads(1, 1, 32)
    checks.check_prefill_attention(device, torch.float32, heads, RAGGED, 16, 32, window, scores=rule)


@pytest.mark.parametrize("window", [None, 20])
def test_sinks(device, window):
    """Guards against a sink of another head, or one that counts in each tile."""
    checks.check_prefill_attention(
        device, torch.float32, checks.Heads(2, 1, 32), RAGGED, 16, 32, window, with_sinks=True
    )


@pytest.mark.parametrize("window", [1, 20, 64, 1000])
def test_window(device, window):
    """Guards against a window that is off by one, and a token whose first tile it does not see at all."""
    checks.check_prefill_attention(device, torch.float32, checks.Heads(1, 1, 32), RAGGED, 16, 32, window)


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_chunks_do_not_matter(device, block_tokens):
    """Guards against tiles that begin where a chunk begins: a prefix from a cache would then change the tokens."""
    checks.check_chunks_do_not_matter(device, torch.bfloat16, checks.Heads(2, 1, 32), block_tokens, 32)


def test_the_work_list_holds_every_tile_once_and_the_longest_first():
    """Guards against tokens that no program computes, and a long item that starts last."""
    work = work_list([40, 0, 1, 64], [40, 9, 71, 128], 2, 32).tolist()
    assert sorted(map(tuple, work)) == sorted(
        (sequence, tile, head) for sequence, tile in [(0, 0), (0, 1), (2, 0), (3, 0), (3, 1)] for head in range(2)
    )
    assert [tuple(item[:2]) for item in work[::2]] == [(3, 1), (3, 0), (2, 0), (0, 1), (0, 0)]
