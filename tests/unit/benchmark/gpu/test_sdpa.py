"""Guards benchmark/gpu/sdpa.py: torch's attention computes what ours does, and an unsupported case is no crash."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from baton.benchmark.gpu import sdpa as bench

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 4


def made(num_new: int, length: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, keys, values, and the answer, computed the plain way."""
    torch.manual_seed(0)
    query = torch.randn(rows, HEADS, num_new, DIM)
    keys, values = torch.randn(2, rows, KV_HEADS, length, DIM)
    seen = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
    shared = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
    of_head, values_of_head = shared
    scores = (query @ of_head.transpose(-1, -2) * DIM**-0.5).masked_fill(~seen, -torch.inf)
    return query, keys, values, scores.softmax(-1) @ values_of_head


def test_pages_are_brought_together() -> None:
    """A page or head in the wrong place would be seen as a fault of theirs, or of ours."""
    pool = torch.randn(6, KV_HEADS, 3, 2, PAGE, DIM)
    tables = torch.tensor([[4, 0], [5, 2]], dtype=torch.int32)
    found = bench.contiguous(pool, 1, tables)
    assert found.shape == (2, 2, KV_HEADS, 2 * PAGE, DIM) and found.is_contiguous()
    for row, page, token in ((0, 0, 1), (0, 1, 3), (1, 0, 0), (1, 1, 2)):
        wanted = pool[tables[row, page], :, 1, :, token].transpose(0, 1)  # [2, KH, D]
        assert torch.equal(found[:, row, :, page * PAGE + token], wanted)


@pytest.mark.parametrize(("num_new", "length", "rows"), [(7, 7, 1), (3, 8, 1), (1, 8, 3)])
def test_attends_as_the_last_tokens(num_new: int, length: int, rows: int) -> None:
    """A causal mask that begins at the first key is another task, with less work."""
    *given, answer = made(num_new, length, rows)
    way = bench.checked_call(FLASH, *given, answer)
    torch.testing.assert_close(way.call(), answer)
    assert not way.expanded


def test_an_answer_that_differs_is_refused() -> None:
    """A wrong kernel's time is no time."""
    query, keys, values, answer = made(7, 7)
    with pytest.raises(bench.Unsupported, match="differs from ours"):
        bench.checked_call(FLASH, query, keys, values, answer * 1.05)
    with pytest.raises(bench.Unsupported, match="by nan"):
        bench.checked_call(FLASH, query, keys, values * torch.nan, answer)


def test_a_backend_that_is_not_there_is_refused() -> None:
    """One that refuses a cell must not end the run."""
    with pytest.raises(bench.Unsupported, match="No "):
        bench.checked_call(CUDNN, *made(7, 7))
    with pytest.raises(bench.Unsupported, match=r"^torch lets cuDNN's causal mask begin at the top left only$"):
        bench.checked_call(CUDNN, *made(3, 8))


def test_heads_are_copied_for_a_backend_that_shares_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would else be left out, though it can compute the cell."""
    whole = bench.scaled_dot_product_attention

    def plain(*given: torch.Tensor, enable_gqa: bool, **options: object) -> torch.Tensor:
        if enable_gqa:
            raise RuntimeError("no shared heads")
        return whole(*given, **options)

    monkeypatch.setattr(bench, "scaled_dot_product_attention", plain)
    *given, answer = made(7, 7)
    way = bench.checked_call(FLASH, *given, answer)
    torch.testing.assert_close(way.call(), answer)
    assert way.expanded


def test_the_reason_is_what_the_backend_lacks() -> None:
    """torch warns about every backend, also those that the test has disabled."""
    warnings = [
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:1.)",
        "Flash attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:2.)",
        "head_dim should be no more than 128 (Triggered internally at sdp_utils.cpp:3.)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.\nmore")
    assert (
        bench._reason(error, warnings) == "head_dim should be no more than 128 No available kernel. Aborting execution."
    )
