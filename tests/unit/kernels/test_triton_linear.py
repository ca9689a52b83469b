"""Products with few rows, and the table that chooses among them."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton import linear_policy
from baton.kernels.triton.linear_policy import FASTEST, INVARIANT, LIKE, Tiles
from baton.tests.unit.kernels import kernel_checks as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 20])
@pytest.mark.parametrize(("fused", "biased", "splits"), [(False, False, 1), (False, True, 2), (True, False, 1)])
def test_several_rows(device, dtype, rows, fused, biased, splits):
    """Guards against rows past the last, a bias that every split adds, and gate and up exchanged."""
    tiles = Tiles(64, 64, 16, 3, splits)
    checks.check_linear(device, dtype, rows, 128, 256, tiles, fused, biased)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fused", "biased"), [(False, False), (False, True), (True, False)])
def test_one_row(device, dtype, fused, biased):
    """Guards against the last block of columns, which is asked for one step ahead."""
    checks.check_linear(device, dtype, 1, 16, 256, Tiles(2, 64, 0, 1, 1), fused, biased)


@pytest.mark.parametrize("tiles", [Tiles(2, 64, 0, 1, 1), Tiles(64, 64, 16, 3, 1)])
def test_gelu_of_the_gate(device, tiles):
    """Guards against silu in its place."""
    checks.check_linear(device, torch.bfloat16, 1, 128, 256, tiles, fused=True, gelu=True)


def test_tiles_that_do_not_divide_are_refused(device):
    """Guards against columns that no program reads."""
    with pytest.raises(ValueError, match="do not divide"):
        checks.check_linear(device, torch.float32, 1, 16, 96, Tiles(2, 64, 0, 1, 1))


@pytest.mark.parametrize("table", [FASTEST, INVARIANT])
def test_tables_fit_their_shapes(table):
    """Guards against an entry that the wrapper would refuse in the middle of serving."""
    for rows, entries in table.items():
        look_up = linear_policy.fastest if table is FASTEST else linear_policy.invariant
        taken = {shape: tiles for shape in LIKE if (tiles := look_up(rows, shape)) is not None}
        for (n, k, fused, _), tiles in (taken | entries).items():
            assert n % tiles.tile_n == 0 and k % (tiles.tile_k * tiles.splits) == 0
            assert not (fused and tiles.splits > 1) and (tiles.tile_m == 0) == (table is FASTEST and rows == 1)


def test_the_invariant_table_has_one_split_a_weight():
    """Guards against a row whose sum is split otherwise in a larger batch."""
    splits: dict[linear_policy.ProductShape, set[int]] = {}
    for entries in INVARIANT.values():
        for shape, tiles in entries.items():
            splits.setdefault(shape, set()).add(tiles.splits)
    assert len(splits) == 5 and all(len(values) == 1 for values in splits.values())


def test_unknown_shapes_are_left_to_cublas():
    assert linear_policy.fastest(1, linear_policy.ProductShape(100, 100)) is None
    assert linear_policy.fastest(300, linear_policy.O_8B) is None
    assert linear_policy.fastest(17, linear_policy.O_8B) is FASTEST[32][linear_policy.O_8B]
    assert linear_policy.invariant(1, linear_policy.O_8B) is INVARIANT[16][linear_policy.O_8B]
    other = linear_policy.O_8B._replace(weight_format="fp8")
    assert linear_policy.fastest(17, other) is None, "tiles that were measured with another format's weights"
