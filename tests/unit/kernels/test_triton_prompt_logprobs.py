"""Log probabilities of given tokens, in parts of a step."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.reference import token_logprobs
from baton.kernels.triton.prompt_logprobs import PromptLogprobRows, prompt_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.parametrize("vocab_size", [131, 9001])
def test_prompt_logprobs(device, dtype, num_top, vocab_size):
    """Guards against blocks joined in another order, a rank that counts equals, and parts that overwrite each other."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(5, vocab_size, generator=generator) * 4).to(dtype).to(device)
    targets = torch.randint(0, vocab_size, (5,), generator=generator, dtype=torch.int32).to(device)
    targets[1] = logits[1].argmax()
    out = PromptLogprobRows.make(7, 3, vocab_size, device)
    for first, part in ((0, logits[:3]), (3, logits[3:])):
        prompt_logprobs(part, targets, first, num_top, out)
    values, ranks, top, _ = token_logprobs(logits, targets.long(), num_top)
    torch.testing.assert_close(out.values[:5], values, rtol=1e-5, atol=1e-5)
    assert out.ranks[:5].tolist() == ranks.tolist() and ranks[1] == 1
    torch.testing.assert_close(out.top[:5, :num_top], top, rtol=1e-5, atol=1e-5)
    found = logits.float().gather(-1, out.top_ids[:5, :num_top].long()) - logits.float().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(found, top, rtol=1e-5, atol=1e-5)
    assert num_top == 0 or out.top[1, 0] == out.values[1], "one float for both"
