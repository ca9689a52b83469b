"""Models with experts: however a sequence is cut, and wherever its KV was computed, the tokens are the same."""

from __future__ import annotations

import pytest
import torch

from baton.kernels.routing import route
from baton.models.batch import Draw, Row
from baton.models.cpu import decoder
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import SamplingSpec

GREEDY = Draw(SamplingSpec(max_tokens=1000, temperature=0.0), (), 0, 0)
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
FAMILIES = {
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 24},
}
NEW = 16


@pytest.fixture(params=FAMILIES)
def made(request, make_model):
    return make_model(request.param, **FAMILIES[request.param])


@pytest.fixture
def long_prompt() -> list[int]:
    return torch.randint(0, 131, (75,), generator=torch.Generator().manual_seed(1)).tolist()


def test_pieces_prefix_hits_and_handed_over_kv_give_the_tokens_of_one_step(made, sequences, long_prompt):
    """Guards against experts that depend on what else is in a step, and on which worker computed the prompt."""
    prompt, runner = long_prompt, ModelRunner.load(made.folder)
    whole = sequences(runner, 2, 128)
    tokens, expected = whole.greedy(0, prompt, NEW)

    def check(found: tuple[list[int], torch.Tensor]) -> None:
        assert found[0] == tokens
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)

    whole.tables[1] = [*whole.tables[0][:3], *whole.tables[1][3:]]
    check(continued(whole, 1, prompt, 48))
    check(sequences(runner, 1, 128).greedy(0, prompt, NEW, chunk=7))

    prefill = sequences(ModelRunner.load(made.folder), 1, 128)
    for row in prefill.chunks(0, prompt, 32):
        prefill.runner.step([row])
    decode = sequences(runner, 1, 128)
    decode.pool.data.copy_(prefill.pool.data)
    check(continued(decode, 0, prompt, len(prompt) - 1))


def test_rows_of_one_step_have_the_tokens_of_each_alone(made, sequences, long_prompt):
    """Guards against rows of another sequence among those of an expert: chunks and single tokens share steps."""
    runner = ModelRunner.load(made.folder)
    prompts = [long_prompt[:size] for size in (1, 9, 30, 75)]
    alone = [sequences(runner, 1, 128).greedy(0, prompt, 8)[0] for prompt in prompts]
    together = sequences(runner, len(prompts), 128)
    known, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
    while busy := [i for i, prompt in enumerate(prompts) if len(known[i]) < len(prompt) + 8]:
        ends = [min(computed[i] + 20, len(known[i])) for i in busy]
        rows = [
            Row(known[i][computed[i] : end], computed[i], together.tables[i], GREEDY if end == len(known[i]) else None)
            for i, end in zip(busy, ends, strict=True)
        ]
        for i, end, drawn in zip(busy, ends, runner.step(rows), strict=True):
            computed[i] = end
            known[i] += drawn.token_ids if drawn is not None else ()
    assert [tokens[len(prompt) :] for tokens, prompt in zip(known, prompts, strict=True)] == alone


def continued(held, index: int, prompt: list[int], start: int) -> tuple[list[int], torch.Tensor]:
    """As `greedy`, of a prompt whose first tokens, `start` of them, are in the pool."""
    known, logits = list(prompt), []
    for _ in range(NEW):
        logits.append(held.runner.compute([Row(known[start:], start, held.tables[index], GREEDY)])[1][0])
        start = len(known)
        known.append(int(logits[-1].argmax()))
    return known[len(prompt) :], torch.stack(logits)


def test_experts_are_those_of_transformers(made, sequences, long_prompt, monkeypatch):
    """Guards the logits of routers: an expert may be another one only where two are as good but for 1e-5."""
    runner, chosen = ModelRunner.load(made.folder), []

    def recording(*arguments):
        experts, weights = route(*arguments)
        chosen.append(experts)
        return experts, weights

    monkeypatch.setattr(decoder.kernels, "route", recording)
    sequences(runner, 1, 128).greedy(0, long_prompt, 1)
    with torch.inference_mode():
        theirs = made.reference(torch.tensor([long_prompt]), output_router_logits=True, use_cache=False).router_logits
    assert runner.config.experts is not None
    top_k = runner.config.experts.top_k
    assert len(chosen) == len(theirs) == sum(runner.config.experts.layers)
    for ours, logits in zip(chosen, theirs, strict=True):
        scores, experts = logits.softmax(-1).sort(dim=-1, descending=True)
        differs = (ours.sort(1).values != experts[:, :top_k].sort(1).values).any(1)
        assert bool(((scores[:, top_k - 1] - scores[:, top_k])[differs] < 1e-5).all())
        assert len(ours.unique()) > top_k, "tokens that all go to the same experts show nothing"
