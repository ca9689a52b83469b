"""Guards `baton bench vector-math`: it finds a table that is wrong, and hears of each process."""

from __future__ import annotations

import pytest
import torch

from baton.benchmark.host import vector_math as bench


def test_a_wrong_part_of_the_first_table_is_found(monkeypatch) -> None:
    """The second table is right, so what differs is the first one's."""
    cosine, made = torch.Tensor.cos, []

    def wrong_at_first(angles: torch.Tensor) -> torch.Tensor:
        table = cosine(angles)
        if not made:
            table[5:7, 3:] += 0.5
        made.append(table)
        return table

    monkeypatch.setattr(torch.Tensor, "cos", wrong_at_first)
    assert bench.wrong_part(9, prepared=True) == {
        "elements": 2 * 61,
        "positions": (5, 6),
        "error": pytest.approx(0.5),
    }
    assert bench.wrong_part(9, prepared=True) == {}


def test_every_process_is_heard() -> None:
    """More than run at once."""
    assert list(bench.in_processes(3, 2, 1, 8, prepared=True)) == [{}] * 3
