"""The search for the threshold of min_p, top_k and top_p: what it leaves, exactly, against kernels.reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import reference
from baton.kernels.triton import sampling_rows as columns
from baton.kernels.triton.sampling_filter import FilterScratch, thresholds
from baton.kernels.triton.sampling_rows import Prepared, SlotTables, prepare

VOCAB = 5000  # two blocks of tokens

CASES = [  # top_k, top_p, min_p, scale of the logits
    (1, 1.0, 0.0, 1.0),
    (2, 1.0, 0.0, 1.0),
    (37, 1.0, 0.0, 5.0),
    (VOCAB - 1, 1.0, 0.0, 1.0),
    (0, 0.5, 0.0, 1.0),
    (0, 0.9, 0.0, 4.0),
    (0, 0.999, 0.0, 0.01),
    (0, 1e-6, 0.0, 1.0),
    (0, 1.0, 0.3, 1.0),
    (9, 0.6, 0.0, 1.0),
    (400, 0.95, 0.0, 0.1),
    (50, 0.8, 0.2, 1.0),
    (3, 0.9, 1.0, 1.0),
    (1000, 1.0, 0.4, 1.0),
    (VOCAB, 1.0, 0.0, 1.0),
]


def kept_by_reference(x: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    row = x[None].clone()
    if min_p > 0.0:
        reference.keep_min_p(row, torch.tensor([[min_p]]))
    if 0 < top_k < VOCAB:
        reference.keep_top_k(row, torch.tensor([[top_k]]))
    if top_p < 1.0:
        reference.keep_top_p(row, torch.tensor([[top_p]]))
    return row[0] > float("-inf")


@pytest.mark.parametrize(("rounded", "cases"), [(False, CASES), (True, CASES[1::3])], ids=["distinct", "equals"])
def test_what_is_kept(device, rounded, cases):
    """Guards against a filter that keeps one token too many or too few, in the wrong order, or parts of equals."""
    count = len(cases)
    logits = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(1))
    logits = logits * torch.tensor([case[3] for case in cases])[:, None] - 1.0
    if rounded:  # to powers of two: sums of masses of equals are still far from any top_p here
        logits = (logits * 4).round() / 4
    tables = SlotTables.make(count, VOCAB, device)
    floats = tables.table.view(torch.float32)
    for slot, (top_k, top_p, min_p, _) in enumerate(cases):
        floats[slot, columns.TEMPERATURE.value] = 1.0
        floats[slot, columns.LOG_MIN_P.value] = torch.tensor(min_p).log()
        floats[slot, columns.TOP_P.value] = top_p
        tables.table[slot, columns.TOP_K.value] = top_k
        tables.table[slot, columns.PREPARED.value] = 1
    floats[:, columns.REPETITION.value] = 1.0
    prepared, scratch = Prepared.make(count, VOCAB, device), FilterScratch.make(count, VOCAB, device)
    slots = torch.arange(count, dtype=torch.int32, device=device)
    prepare(logits.to(device), slots, slots, tables, prepared)
    thresholds(prepared, slots, tables, scratch)
    assert torch.equal(prepared.values.cpu(), logits)
    kept = prepared.values >= scratch.thresholds[:, None]
    for row, (top_k, top_p, min_p, scale) in enumerate(cases):
        expected = kept_by_reference(logits[row], top_k, top_p, min_p)
        assert torch.equal(kept[row].cpu(), expected), (top_k, top_p, min_p, scale, kept[row].sum(), expected.sum())
