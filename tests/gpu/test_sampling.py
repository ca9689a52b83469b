"""The sampler on a GPU against the CPU's, with the vocabularies and rows of served models, launched and captured."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import Draw
from baton.models.cpu.sampler import draw_tokens
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.slots import SlotSampler
from baton.node.messages.control import SamplingSpec

pytestmark = pytest.mark.gpu

FILTERS: tuple[dict[str, object], ...] = (
    {},
    {"top_p": 0.9},
    {"top_k": 50},
    {"top_k": 1000, "top_p": 0.95},
    {"min_p": 0.02, "top_p": 0.99},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"presence_penalty": 1.0, "top_k": 20, "logit_bias": ((5, 3.0), (100_000, 2.0))},
    {"min_tokens": 9, "stop_token_ids": tuple(range(0, 1000, 8)), "top_p": 0.7},
    {"allowed_token_ids": tuple(range(1, 128_000, 127)), "top_p": 0.95},
    {"temperature": 0.0},
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_tokens_equal_the_cpu_s(vocab_size, dtype):
    """Guards the compiled kernels: barriers between tokens and blocks, exact divisions, and captures that differ from
    launches. One token of 64 may differ: logarithms and sums of masses are rounded."""
    rows, queue = 64, CudaQueue(0)
    sampler = SlotSampler(queue, rows, rows, vocab_size)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab_size, generator=generator) * torch.linspace(0.3, 5, rows)[:, None]).to(dtype)
    draws = []
    for row in range(rows):
        fields = {"max_tokens": 99, "temperature": 0.8, "seed": (row << 40) + 3, **FILTERS[row % len(FILTERS)]}
        best = logits[row].float().topk(6).indices.tolist()  # the tokens that penalties must bring down
        if row % 5 == 4:  # the likeliest is forbidden after the last two, the next is not
            fields["bad_words"] = ((best[1], best[2], best[0]), (best[2], best[2], best[1]), (7,))
        draws.append(Draw(SamplingSpec(**fields), (*range(500), *best, *best[:3]), 503, 6))
        sampler.set_row(row, draws[row])
    sampler.flush()
    queue.mark().wait()
    there = logits.to("cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    positions = torch.full_like(slots, 509)
    launched, captured = (torch.full((rows,), -1, dtype=torch.int32, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    counted = sampler.tables.counts.clone()
    sampler.draw_edited(there, slots, positions, launched)
    torch.cuda.synchronize()
    replay = queue.capture(lambda: sampler.draw_edited(there, slots, positions, captured))
    sampler.tables.counts.copy_(counted)
    torch.cuda.synchronize()
    queue.enqueue(replay)
    queue.mark().wait()
    assert torch.equal(launched, captured)
    expected = [each.token_ids[0] for each in draw_tokens(logits.float(), draws, positions.tolist())]
    wrong = [row for row in range(rows) if launched[row].item() != expected[row]]
    assert len(wrong) <= 1, [(row, draws[row].sampling, launched[row].item(), expected[row]) for row in wrong]
