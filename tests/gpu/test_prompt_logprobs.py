"""The kernel of prompts' log probabilities on a GPU, against plain torch."""

import pytest
import torch

from baton.kernels.reference import token_logprobs
from baton.kernels.triton.prompt_logprobs import PromptLogprobRows, prompt_logprobs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_logprobs_of_a_large_vocabulary(dtype):
    """Guards against blocks of a vocabulary that are joined in another order, and ranks that count equals."""
    generator = torch.Generator("cuda").manual_seed(1)
    logits = (torch.randn(128, 128256, generator=generator, device="cuda") * 4).to(dtype)
    targets = torch.randint(0, 128256, (128,), generator=generator, device="cuda", dtype=torch.int32)
    out = PromptLogprobRows.make(256, 128, 128256, "cuda")
    prompt_logprobs(logits, targets, 0, 20, out)
    values, ranks, top, _ = token_logprobs(logits, targets.long(), 20)
    torch.testing.assert_close(out.values[:128], values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.top[:128], top, rtol=1e-4, atol=1e-4)
    assert out.ranks[:128].tolist() == ranks.tolist()
