"""The pool as the kernels see it: only units that are contiguous and equally far apart are taken."""

import pytest

torch = pytest.importorskip("torch")

from baton.kernels.triton.pool import PagedPool  # noqa: E402


def test_rows_are_where_the_formula_says() -> None:
    """Guards what kernels compute: a row of the matrix is one token's key or value in one head and layer."""
    tensor = torch.arange(3 * 2 * 5 * 2 * 4 * 8).view(3, 2, 5, 2, 4, 8)[:, :, :4]
    pool = PagedPool.of(tensor)
    assert (pool.num_units, pool.num_layers, pool.block_tokens, pool.head_dim, pool.unit_rows) == (2, 4, 4, 8, 40)
    for block, unit, layer, plane, token in ((0, 0, 0, 0, 0), (1, 1, 2, 1, 3), (2, 1, 3, 1, 3)):
        row = (block * 2 + unit) * 40 + (layer * 2 + plane) * 4 + token
        assert torch.equal(pool.rows[row], tensor[block, unit, layer, plane, token])
    assert len(pool.rows) == 6 * 40 - 8, "the padding behind the last unit is no row"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 2, 4, 2, 4),
        torch.zeros(3, 2, 4, 3, 4, 8),
        torch.zeros(3, 2, 4, 2, 8, 4).transpose(4, 5),
        torch.zeros(3, 3, 4, 2, 4, 8)[:, :2],
        torch.zeros(3, 2, 4, 2, 4, 16)[..., :8],
        torch.zeros(3, 1, 4, 2, 4, 8).expand(3, 2, 4, 2, 4, 8),
    ],
    ids=["five dimensions", "three planes", "transposed", "units left out", "rows with gaps", "units that overlap"],
)
def test_another_layout_is_refused(tensor: torch.Tensor) -> None:
    """Guards memory that is not the pool's: kernels count rows and check nothing."""
    with pytest.raises(ValueError):
        PagedPool.of(tensor)


def test_a_layer_that_is_not_there_is_refused() -> None:
    pool = PagedPool.of(torch.zeros(1, 1, 4, 2, 4, 8))
    pool.require_layer(3)
    for layer in (-1, 4):
        with pytest.raises(ValueError):
            pool.require_layer(layer)
