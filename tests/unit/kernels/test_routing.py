"""Which experts a token goes to, against the routers of transformers; an MLP of experts against a loop over tokens."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from baton import kernels
from baton.kernels import DenseLinear, ExpertLinears, Routing, ScaledLinear, route
from baton.kernels.routing import expected_experts

HIDDEN, EXPERTS = 32, 24
DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 5,
    "n_group": 6,
    "topk_group": 3,
    "moe_intermediate_size": 8,
}
GROUPS = {"num_groups": 6, "kept_groups": 3}
CASES = {
    "mixtral": (MixtralTopKRouter, transformers.MixtralConfig, {"num_local_experts": EXPERTS}, Routing(EXPERTS, 2)),
    "qwen2-moe": (
        Qwen2MoeTopKRouter,
        transformers.Qwen2MoeConfig,
        {"num_experts": EXPERTS, "num_experts_per_tok": 4},
        Routing(EXPERTS, 4, renormalised=False),
    ),
    "deepseek-v2, greedy": (
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config,
        DEEPSEEK,
        Routing(EXPERTS, 5, renormalised=False),
    ),
    "deepseek-v2, groups": (
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config,
        DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        Routing(EXPERTS, 5, renormalised=False, scale=16.0, **GROUPS),
    ),
    "deepseek-v3": (
        DeepseekV3TopkRouter,
        transformers.DeepseekV3Config,
        DEEPSEEK,
        Routing(EXPERTS, 5, sigmoid=True, scale=2.5, groups_by_two=True, **GROUPS),
    ),
    "deepseek-v3, as they are": (
        DeepseekV3TopkRouter,
        transformers.DeepseekV3Config,
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        Routing(EXPERTS, 5, sigmoid=True, renormalised=False, scale=2.5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_experts_and_weights_equal_those_of_transformers(name):
    """Guards each rule of a router: groups, the correction that chooses and does not weigh, sums, scales."""
    router_class, config_class, config, routing = CASES[name]
    torch.manual_seed(3)
    router = router_class(config_class(hidden_size=HIDDEN, **config))
    router.weight.data = torch.randn(EXPERTS, HIDDEN) * 0.3
    correction = None
    if routing.sigmoid:
        correction = router.e_score_correction_bias = torch.randn(EXPERTS) * 0.4
    with torch.inference_mode():
        logits, theirs, chosen = router(torch.randn(500, HIDDEN))
        experts, weights = route(logits, correction, routing)
    order = chosen.argsort(1)
    ours = experts.argsort(1)
    assert torch.equal(experts.gather(1, ours), chosen.gather(1, order))
    torch.testing.assert_close(weights.gather(1, ours), theirs.gather(1, order), rtol=1e-6, atol=1e-7)


def test_of_equal_experts_the_lower_ones_are_chosen():
    """Guards against routes that depend on how a device sorts, where logits are equal."""
    experts, weights = route(torch.zeros(2, 6), None, Routing(6, 3))
    assert experts.tolist() == [[0, 1, 2]] * 2
    assert weights.tolist() == [[pytest.approx(1 / 3)] * 3] * 2


def stack(num_experts: int, outputs: int, inputs: int) -> ExpertLinears:
    return ExpertLinears(DenseLinear(torch.randn(num_experts * outputs, inputs)), num_experts)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(1, 3), st.integers(0, 5), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_each_token_has_the_sum_of_its_experts(tokens, top_k, first, held, packed, seed):
    """Guards against rows of another token or expert: experts without tokens, tokens without experts of this rank."""
    torch.manual_seed(seed)
    gate_up, down = stack(held, 10, 7), stack(held, 7, 5)
    x, weights = torch.randn(tokens, 7), torch.rand(tokens, top_k)
    experts = torch.stack([torch.randperm(11)[:top_k] for _ in range(tokens)] or [torch.empty(top_k)])[:tokens].long()
    expected = torch.zeros(tokens, 7)
    for token in range(tokens):
        for expert, weight in zip(experts[token].tolist(), weights[token], strict=True):
            if first <= expert < first + held:
                gated = kernels.silu_and_mul(gate_up.expert(expert - first)(x[token, None]))
                expected[token] += weight * down.expert(expert - first)(gated)[0]
    if packed:
        gate_up.pack()
        down.pack()
    added = kernels.apply_experts(x, experts, weights, gate_up, down, kernels.silu_and_mul, first)
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [(1, 8), (4, 8)])
def test_an_expert_of_codes_has_the_scales_of_its_rows(block):
    """Guards against the scales of a neighbour, whether they are of rows or of blocks."""
    torch.manual_seed(1)
    codes = (torch.randn(3 * 8, 8) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(24) if block[0] == 1 else torch.rand(24 // block[0], 1)
    whole = ScaledLinear(codes, scales, *block)
    x = torch.randn(2, 8)
    for index, expected in enumerate(whole(x).chunk(3, -1)):
        torch.testing.assert_close(ExpertLinears(whole, 3).expert(index)(x), expected)


def test_distinct_experts_are_as_many_as_expected():
    """Guards the figure that plans and benchmarks take a step's bytes from."""
    routing = Routing(128, 8)
    assert [round(expected_experts(tokens, routing)) for tokens in (0, 1, 8, 32, 64)] == [0, 8, 52, 112, 126]
