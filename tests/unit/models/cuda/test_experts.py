"""Models with experts by the GPU's runner, on CPU tensors with its kernels interpreted: against the CPU's runner."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import ExpertLinears, Routing, ScaledLinear
from baton.models.config import ModelConfig
from baton.models.cuda.experts import plan_experts
from baton.models.cuda.products import fastest
from baton.models.cuda.products.experts_scaled import ScaledExperts
from baton.models.cuda.products.experts_sizes import ExpertsSizes
from baton.models.weights import load_weights
from baton.node.errors import SettingsError
from baton.tests.unit.kernels.expert_checks import routes_of, some_logits
from baton.tests.unit.models.cuda.ahead import Ahead, check_drafts, one_after_the_other
from baton.tests.unit.models.cuda.test_runner import PROMPTS, TABLES, make

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


def test_steps_ahead_of_the_host_give_the_cpu_s_tokens(make_model):
    """Guards rows that pad a captured step, which choose no expert, prompts beside rows that decode, weights that do
    not sum to 1, a shared expert and its gate, and a layer without experts."""
    config = EXPERTS | {"shared_expert_intermediate_size": 48, "mlp_only_layers": [0]}
    folder = make_model("qwen2_moe", num_hidden_layers=2, vocab_size=144, **config).folder
    late, plain = make(folder, max_rows=3, mixed_tokens=1)
    run = Ahead(late)
    run.start(0, PROMPTS[0], TABLES[0])
    run.start(1, PROMPTS[1], TABLES[1])
    for slots in ([0], [0, 1], [1, 0]):
        run.launch(slots, chunk=9)
    run.start(2, PROMPTS[2], TABLES[2])
    for slots in ([0, 1, 2], [2, 0, 1], [1]):
        run.launch(slots)
    for slot in (0, 1, 2):
        found = run.generated(slot)
        assert found == one_after_the_other(plain, PROMPTS[slot], TABLES[slot], len(found))


def test_drafts_are_verified(make_model):
    """Guards drafts that choose the experts of another place, and places for drafts that are not there."""
    folder = make_model("qwen3_moe", num_hidden_layers=1, vocab_size=144, **EXPERTS).folder
    late, plain = make(folder, max_rows=1, most_drafts=3)
    check_drafts(late, plain, PROMPTS[0], TABLES[0], 8)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (
            "gpt_oss",
            {
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_local_experts": 4,
                "sliding_window": 12,
            },
        ),
        ("olmoe", {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32, "num_experts": 4}),
    ],
)
def test_sinks_biases_and_norms_of_whole_rows_give_the_cpu_s_tokens(make_model, family, config):
    """Guards what a family has of its own on its way through kernels: in prompts, and in rows that decode."""
    folder = make_model(family, vocab_size=144, num_experts_per_tok=2, **config).folder
    late, plain = make(folder, max_rows=2, mixed_tokens=1)
    run = Ahead(late)
    run.start(0, PROMPTS[0], TABLES[0])
    run.start(1, PROMPTS[1], TABLES[1])
    for slots in ([0, 1], [1, 0], [0, 1]):
        run.launch(slots, chunk=16)
    for slot in (0, 1):
        found = run.generated(slot)
        assert found and found == one_after_the_other(plain, PROMPTS[slot], TABLES[slot], len(found))


def test_experts_without_kernels_are_refused_by_name(make_model):
    """Guards against a worker that fails at its first request."""
    folder = make_model("qwen3_moe", num_hidden_layers=1, **EXPERTS | {"moe_intermediate_size": 24}).folder
    with pytest.raises(SettingsError, match="width 24"):
        make(folder)


def test_adapters_of_experts_in_8_bits_are_refused_by_name(make_model):
    """Guards against a worker that takes such adapters and fails at the first request with one."""
    folder = make_model("qwen3_moe", num_hidden_layers=1, **EXPERTS).folder
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, torch.float32, pack=False)
    layer, codes = weights.layers[0], random_experts(8, 64, 48, False)
    weights = replace(weights, layers=(replace(layer, mlp=replace(layer.mlp, gate_up=codes, down=codes)),))
    with pytest.raises(SettingsError, match=r"--lora-room experts: .* not in 8 bits"):
        plan_experts(weights, fastest, 4, pair_width=32)


@pytest.mark.parametrize("weight_format", ["fp8_row", "fp8_block"])
def test_one_token_takes_experts_of_8_bits_as_it_is(weight_format):
    """Guards against tiles of another number of rows than the kernel's, and rows of the token before."""
    routing, size = Routing(4, 2), 256
    products = ScaledExperts(ExpertsSizes(routing, range(4), size, size), weight_format, 3, torch.float32, "cpu")
    assert products.tile_rows(1) == 1 and products.tile_rows(2) > 1
    blocked = weight_format == "fp8_block"
    gate_up, down = random_experts(4, 2 * size, size, blocked), random_experts(4, size, size, blocked)
    for seed in (1, 2):
        routes = routes_of(some_logits(1, 4, False, seed), routing, products.tile_rows(1), "cpu")
        x = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
        rows = products(gate_up, down, x, routes, pdl=False)
        for position in routes.positions[0].tolist():
            expert = int(routes.experts[position // routes.tile_m])
            gate, up = gate_up.expert(expert)(x).chunk(2, 1)
            exact = down.expert(expert)(torch.nn.functional.silu(gate) * up)[0]
            assert (rows[position] - exact).norm() / exact.norm() < 1e-5


def random_experts(count: int, outputs: int, inputs: int, blocked: bool) -> ExpertLinears:
    """FP8 with scales of outputs or of blocks."""
    some = torch.Generator().manual_seed(outputs)
    codes = torch.randn(count * outputs, inputs, generator=some).mul(40).to(torch.float8_e4m3fn)
    of_blocks = (count * outputs // 128, inputs // 128)
    scales = torch.rand(of_blocks if blocked else (count * outputs,), generator=some) / 500
    return ExpertLinears(ScaledLinear(codes, scales, *((128, 128) if blocked else (1, inputs))), count)
