"""Kernels of adapters: grouping of rows, and what they add to a product, in place and inside it."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton import low_rank
from baton.kernels.triton.linear_policy import Tiles
from baton.tests.unit.kernels import adapter_checks as checks


@pytest.mark.parametrize(("rows", "num_slots"), [(1, 1), (5, 64), (40, 3), (130, 64)])
def test_rows_are_grouped(device, rows, num_slots):
    """Guards against a row that no item or two items have, and items that a step before left."""
    checks.check_group(checks.some_adapters(rows, num_slots, device, rows), num_slots)


def test_rows_of_one_adapter_and_of_none(device):
    """Guards against an item of more rows than a tile has, and groups of rows without adapters."""
    for slot in (2, -1):
        checks.check_group(torch.full((37,), slot, dtype=torch.int32, device=device), 4)


@pytest.mark.parametrize(
    ("dtype", "rows", "ranks"),
    [(torch.float32, 20, [16, 0, 32]), (torch.bfloat16, 1, [16]), (torch.bfloat16, 33, [32, 16])],
)
def test_expand_adds_to_a_product(device, dtype, rows, ranks):
    """Guards against another adapter's matrices, ranks below the largest, and parts that read another's ranks."""
    checks.check_expand(device, dtype, rows, ranks, 32, 128, (64, 80, 96))


@pytest.mark.parametrize("rows", [5, 300])
def test_expand_adds_in_wide_tiles_and_to_many_rows(device, rows):
    """Guards against a tile that another tile's parts reach, items that no program has, and K in other parts."""
    checks.check_expand(device, torch.bfloat16, rows, [16, 0, 16, 16], 16, 256, (512, 1024, 2048))


@pytest.mark.parametrize("outputs", [75, 16 * 513])
def test_expand_adds_to_outputs_that_are_no_whole_tiles(device, outputs):
    """Guards against outputs past the last, of a row, of B and of memory, and items that no program has."""
    checks.check_expand(device, torch.bfloat16, 40, [16, 0, 16], 16, 64, (outputs,), few_programs=2)


@pytest.mark.parametrize("rows", [1, low_rank.AHEAD_ROWS])
def test_what_is_added_where_matrices_are_read_before_rows(device, rows):
    """Guards the parts of A that a program has before x: of a lower rank, and of none."""
    checks.check_expand(device, torch.float32, rows, [16, 0, 32], 32, 1024, (64, 80, 96), ahead=True)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 40), (torch.bfloat16, 1), (torch.bfloat16, 5)])
def test_what_is_added_to_embeddings(device, dtype, rows):
    """Guards against another adapter's rows, those of another token, and a rank of zero."""
    checks.check_embed(device, dtype, rows, [16, 0, 32], 32, 75, 48)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tiles", "rows"),
    [
        (torch.float32, Tiles(32, 64, 16, 3, 1), 5),
        (torch.bfloat16, Tiles(32, 64, 16, 3, 2), 20),
        (torch.bfloat16, Tiles(8, 64, 0, 1, 1), 1),
    ],
)
def test_a_product_adds_what_adapters_add(device, dtype, tiles, rows, scaled):
    """Guards against a split that adds it again or is not scaled, a bias that is scaled, and rows whose bits depend on
    their neighbours."""
    checks.check_linear_added(device, dtype, rows, [32, 16, 0], 32, tiles, (64, 96, 128), k=128, scaled=scaled)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("tiles", "rows"), [(Tiles(32, 64, 16, 3, 1), 9), (Tiles(8, 64, 0, 1, 1), 1)])
def test_a_product_of_gate_and_up(device, tiles, rows, scaled):
    """Guards against gate's matrices or scales for up, and what is added behind the activation."""
    ends = (64, 128)
    checks.check_linear_added(device, torch.bfloat16, rows, [16, 32], 32, tiles, ends, k=128, fused=True, scaled=scaled)


@pytest.mark.parametrize(("dtype", "rows", "splits"), [(torch.float32, 20, 3), (torch.bfloat16, 1, 1)])
def test_products_in_memory_are_scaled(device, dtype, rows, splits):
    """Guards against a part that is left as it was, a bias that is scaled, scales of another product or adapter, and a
    row past the last block."""
    checks.check_add_in_place(device, dtype, rows, [16, 0, 32], 32, 128, (64, 1040, 1072), splits)


def test_what_is_not_made_beside_is_not_added_late(device):
    """Guards against a product that begins before x is there."""
    x, of_rows = torch.zeros(2, 32, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    added = checks.added_to(checks.Adapters.make([16], 16, 32, (16,), torch.float32, device), x, of_rows)
    with pytest.raises(ValueError, match="not made beside"):
        added.apart(pdl=True)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 21), (torch.bfloat16, 3)])
def test_whole_weights_take_the_place_of_the_model_s(device, dtype, rows):
    """Guards against another slot's tables, rows past the last tile, and what a slot held before."""
    checks.check_whole_weights(device, dtype, rows, 3, 48, 75)
