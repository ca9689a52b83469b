"""Attention of a step's layers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.cuda.attention import OfLayer, Repeating


def test_attention_is_repeated_over_the_same_memory_and_of_the_same_kind_only():
    """Guards against layers that read the query, or have the window, of another."""
    launched: list[tuple] = []

    def launch(layer: int, query: torch.Tensor, out: torch.Tensor) -> OfLayer:
        launched.append((layer, "anew"))
        return lambda layer: launched.append((layer, "repeated"))

    attend = Repeating(launch, [None, None, 8, 8, None, None, None])
    query, out = torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    for layer in range(5):
        attend(layer, query[:3], out[:3])
    attend(5, query[:2], out[:2])
    attend(6, query[:2], out[1:3])
    how = ["anew", "repeated", "anew", "repeated", "repeated", "anew", "anew"]
    assert launched == list(enumerate(how))
