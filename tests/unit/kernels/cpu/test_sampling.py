"""The CPU's filters and draws against the obvious ones, where the two go different ways."""

import pytest
import torch

from baton import kernels
from baton.kernels import reference
from baton.kernels.cpu.sampling import LIKELY
from baton.kernels.philox import uniform

VOCAB = 1500


@pytest.fixture
def logits() -> torch.Tensor:
    """Rows from one near certainty to nearly flat, where a nucleus is nearly the whole vocabulary; one with ties."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([8.0, 3.0, 1.0, 0.3, 0.01])[:, None]
    rows = torch.randn(6, VOCAB, generator=generator)
    rows[:5] *= scales
    rows[5] = torch.randint(0, 4, (VOCAB,), generator=generator)
    return rows


def survivors(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_the_reference(logits, top_p):
    """Guards against a nucleus that is cut where the likeliest few end."""
    fast, slow = logits.clone(), logits.clone()
    values = torch.full((6, 1), top_p)
    kernels.keep_top_p(fast, values)
    reference.keep_top_p(slow, values)
    assert survivors(fast) == survivors(slow)
    if top_p == 0.9:
        sizes = [len(row) for row in survivors(slow)]
        assert min(sizes) < LIKELY < max(sizes), "both ways must have been gone"


def test_top_p_keeps_the_fewest_that_reach_it(logits):
    """Guards against the reference itself: removing the least likely survivor must fall below top_p."""
    values = torch.linspace(0.2, 0.95, 5)[:, None]
    rows = logits[:5].clone()
    reference.keep_top_p(rows, values)
    probabilities = logits[:5].double().softmax(-1)
    for row, kept in enumerate(survivors(rows)):
        masses = probabilities[row, sorted(kept)]
        assert float(masses.sum()) >= float(values[row]) - 1e-6
        assert float(masses.sum() - masses.min()) < float(values[row]) + 1e-6


@pytest.mark.parametrize("top_k", [1, 7, LIKELY, LIKELY + 1, VOCAB])
def test_top_k_equals_the_reference(logits, top_k):
    fast, slow = logits.clone(), logits.clone()
    values = torch.tensor([[top_k], [1], [top_k], [3], [top_k], [top_k]])
    kernels.keep_top_k(fast, values)
    reference.keep_top_k(slow, values)
    assert survivors(fast) == survivors(slow)
    assert [len(row) for row in survivors(slow)[:5]] == values[:5, 0].tolist()


def test_equals_of_the_last_kept_are_kept():
    """Guards against a result that depends on the order in which a sort leaves equals."""
    for keep, value in (
        (kernels.keep_top_k, 2),
        (reference.keep_top_k, 2),
        (kernels.keep_top_p, 0.97),
        (reference.keep_top_p, 0.97),
    ):
        found = torch.tensor([[1.0, 5.0, 1.0, 1.0, 0.0]])
        keep(found, torch.tensor([[value]]))
        assert survivors(found) == [{0, 1, 2, 3}]


@pytest.mark.parametrize("kept", [1, 5, 300, VOCAB])
def test_draw_of_few_equals_the_draw_of_all(logits, kept):
    """Guards against a draw that changes when a filter of another row makes the batch go the other way."""
    reference.keep_top_k(logits, torch.full((6, 1), kept))
    seeds, positions = torch.arange(6) + (1 << 40), torch.arange(6) + 3
    expected = reference.gumbel_argmax(logits, uniform(seeds, positions, VOCAB))
    assert torch.equal(kernels.draw(logits, seeds, positions), expected)
    for row in range(6):
        only = slice(row, row + 1)
        assert torch.equal(kernels.draw(logits[only], seeds[only], positions[only]), expected[only])
