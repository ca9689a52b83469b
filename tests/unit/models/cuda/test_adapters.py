"""Steps with adapters, on CPU tensors and run as late as can be: against a model with the adapter in its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.models.adapters.adapter import Adapter, LayerAdapter, LowRank
from baton.models.adapters.modules import EMBEDDING, LM_HEAD
from baton.models.adapters.token_rows import ENDING, take_token_rows
from baton.models.batch import Draw, PromptTargets, Row
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_bank import BankSlots
from baton.models.cuda.adapter_layout import BankLayout, BankShape
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import Policy, fastest, invariant, untuned
from baton.models.cuda.runner import CudaRunner
from baton.models.weights import load_weights
from baton.node.errors import AdapterError
from baton.node.messages.control import SamplingSpec
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.conftest import LATENT
from baton.tests.unit.models.cuda.ahead import Ahead, one_after_the_other
from baton.tests.unit.models.cuda.merged import (
    merged_runner,
    random_adapter,
    with_experts,
    with_latents,
    with_magnitudes,
    with_routers,
    with_vocabulary,
    with_wholes,
)

BLOCK = 16
PROMPTS = {0: [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], 1: [2, 7], 2: [10, 20, 30, 40, 50]}
TABLES = {0: [4, 11, 2], 1: [7, 0], 2: [9, 3, 5]}
NAMED = {0: 1, 2: 0}
"""Adapters of the sequences; the other has none."""
DRAW = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)

Edit = Callable[[Adapter, ModelConfig], Adapter]


MAGNITUDES = {"adapter_magnitudes": True}
LATENTS = {"adapter_latents": True}
ROUTERS = {"adapter_routers": True}
EXPERTS = {"adapter_experts": True}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SCALED_ROUTERS = ROUTERS | MAGNITUDES


def unchanged(adapter: Adapter, config: ModelConfig) -> Adapter:
    return adapter


def with_scaled_vocabulary(adapter: Adapter, config: ModelConfig) -> Adapter:
    return with_magnitudes(with_vocabulary(adapter, config), config)


def with_scaled_latents(adapter: Adapter, config: ModelConfig) -> Adapter:
    return with_magnitudes(with_latents(adapter, config), config)


def with_scaled_routers(adapter: Adapter, config: ModelConfig) -> Adapter:
    return with_magnitudes(with_routers(adapter, config), config)


class Served:
    """A runner with adapters in its slots, and the CPU's with each in its weights."""

    def __init__(self, folder: Path, policy: Policy, edit: Edit = unchanged, **limits) -> None:
        """edit: of the first adapter."""
        self.config = ModelConfig.from_folder(folder)
        self.weights = weights = load_weights(self.config, folder, torch.float32, pack=False)
        step_limits = StepLimits(3, 64, **{"adapter_slots": 2, "max_rank": 16, **limits})
        self.late = CudaRunner(self.config, weights, LateQueue(), step_limits, 512, policy)
        adapters = [random_adapter(self.config, [12], 1), random_adapter(self.config, [8, 3], 2, without=["down"])]
        adapters[0] = edit(adapters[0], self.config)
        for slot, adapter in enumerate(adapters):
            assert self.late.adapters.fill(slot, self.late.adapters.prepare(adapter)).done
        plain = merged_runner(self.config, weights, None, BLOCK)
        self.late.bind_pool(torch.zeros(plain.kv_shape(24, BLOCK)), 96)
        self.by_adapter = {None: plain} | {
            slot: merged_runner(self.config, weights, adapter, BLOCK) for slot, adapter in enumerate(adapters)
        }

    def expected(self, slot: int, count: int) -> list[int]:
        """Tokens of a sequence alone."""
        return one_after_the_other(self.by_adapter[NAMED.get(slot)], PROMPTS[slot], TABLES[slot], count)

    def check_logits(self) -> None:
        """Of all prompts in one step."""
        rows = [Row(PROMPTS[slot], 0, TABLES[slot], DRAW, slot, adapter=NAMED.get(slot)) for slot in PROMPTS]
        found = self.late.logits(rows)
        for slot, row in enumerate(rows):
            exact = self.by_adapter[row.adapter].compute([row._replace(adapter=None)])[1]
            torch.testing.assert_close(found[slot : slot + 1], exact, rtol=2e-4, atol=2e-4)


@pytest.fixture
def served(make_model) -> Served:
    """A family with a gate of its own and one head of keys; sums are in parts, as by the tables of large models."""
    folder = make_model("gemma2", num_hidden_layers=2, vocab_size=160).folder
    return Served(folder, in_two, mixed_tokens=4)


def in_two(num_rows: int, shape: ProductShape) -> Tiles:
    """Tiles as large as fit, and two parts of sums."""
    tiles = untuned(num_rows, shape)
    return tiles if shape.fused or shape.inputs % 32 else replace(tiles, tile_k=16, splits=2)


def test_logits_and_tokens_of_mixed_batches_equal_those_of_merged_weights(served):
    """Guards every product's part of a slot, other ranks in one product, parts that are left alone, rows that are left
    behind the last layer's attention; grouping on the device, captured steps, steps of rows and prompts in one pass,
    and a slot of sequences that another takes over."""
    served.check_logits()
    run = Ahead(served.late)
    run.adapters = NAMED
    for slot, prompt in PROMPTS.items():
        run.start(slot, prompt, TABLES[slot])
        while run.computed[slot] < len(prompt):
            run.launch([*range(slot), slot], 9)
    run.launch(list(PROMPTS))
    run.launch(list(PROMPTS))
    assert [run.generated(slot)[:3] for slot in PROMPTS] == [served.expected(slot, 3) for slot in PROMPTS]
    run.adapters = {1: 0}  # the sequences' slots have others now
    run.start(0, PROMPTS[1], TABLES[0])
    run.start(1, PROMPTS[2], TABLES[1])
    for _ in range(2):
        run.launch([0, 1])
    alone = one_after_the_other
    assert run.generated(0)[:2] == alone(served.by_adapter[None], PROMPTS[1], TABLES[0], 2)
    assert run.generated(1)[:2] == alone(served.by_adapter[0], PROMPTS[2], TABLES[1], 2)


def one_row_apart(num_rows: int, shape: ProductShape) -> Tiles:
    """As in_two, with the kernel for a single row."""
    return Tiles(8, 16, 0, 1, 1) if num_rows == 1 else in_two(num_rows, shape)


@pytest.mark.parametrize(
    ("family", "edit", "limits"),
    [
        ("llama", unchanged, {}),
        ("gemma2", unchanged, {}),
        ("qwen2", with_magnitudes, MAGNITUDES),
        ("gemma2", with_magnitudes, MAGNITUDES),
    ],
)
def test_tokens_of_sequences_alone_equal_those_of_merged_weights(make_model, family, edit, limits):
    """Guards what the product of a single row adds, also to gate and up of either activation, and magnitudes of
    products with a bias and without."""
    folder = make_model(family, num_hidden_layers=1, vocab_size=160).folder
    served = Served(folder, one_row_apart, edit, mixed_tokens=4, **limits)
    served.check_logits()
    for slot in (0, 2):
        run = Ahead(served.late)
        run.adapters = NAMED
        run.start(slot, PROMPTS[slot], TABLES[slot])
        while run.computed[slot] < len(PROMPTS[slot]):
            run.launch([slot], 9)
        run.launch([slot])
        run.launch([slot])
        assert run.generated(slot)[:3] == served.expected(slot, 3)


@pytest.mark.parametrize(
    ("family", "config", "edit", "limits"),
    [
        ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 48}, unchanged, {}),
        ("qwen2_moe", {"num_experts": 10, "shared_expert_intermediate_size": 48}, with_routers, ROUTERS),
        ("qwen2_moe", {"num_experts": 10, "shared_expert_intermediate_size": 48}, with_scaled_routers, SCALED_ROUTERS),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, with_scaled_routers, SCALED_ROUTERS),
        ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 48}, with_experts, EXPERTS),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16, "intermediate_size": 32}, with_experts, EXPERTS),
        ("deepseek_v3", LATENT | {"q_lora_rank": 32, "first_k_dense_replace": 0}, with_routers, ROUTERS),
        ("deepseek_v2", LATENT | {"q_lora_rank": None}, with_scaled_latents, LATENTS | MAGNITUDES),
        ("deepseek_v3", LATENT | {"q_lora_rank": 32, "first_k_dense_replace": 0}, with_latents, LATENTS),
    ],
)
def test_tokens_beside_experts_and_of_latent_attention_equal_those_of_merged_weights(
    make_model, family, config, edit, limits
):
    """Guards products that are launched beside those of dense layers: of shared experts, of rows that are left behind
    the last layer's attention too, of routers and gates of which the logits are parts side by side, a bias of a router
    that is not scaled, of routed experts, before either gate, and of latent attention with queries' latents and
    without, whose keys and values are made in parts."""
    sizes = {"v_head_dim": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    config |= sizes | {"num_hidden_layers": 1, "vocab_size": 144}
    served = Served(make_model(family, **config).folder, fastest, edit, mixed_tokens=1, **limits)
    run = Ahead(served.late)
    run.adapters = NAMED
    for slot, prompt in PROMPTS.items():
        run.start(slot, prompt, TABLES[slot])
    run.launch(list(PROMPTS), 9)
    run.launch(list(PROMPTS), 9)
    run.launch(list(PROMPTS))
    found = [run.generated(slot)[:2] for slot in PROMPTS]
    assert [len(tokens) for tokens in found] == [2, 2, 2]
    assert found == [served.expected(slot, 2) for slot in PROMPTS]
    assert found[0] != one_after_the_other(served.by_adapter[None], PROMPTS[0], TABLES[0], 2), "it changes nothing"


@pytest.mark.parametrize(
    ("family", "vocab_size", "edit", "limits"),
    [
        ("llama", 176, with_wholes, {"adapter_wholes": True}),
        ("gemma2", 163, with_vocabulary, {"adapter_vocabulary": True}),
        ("qwen2", 163, with_scaled_vocabulary, {"adapter_vocabulary": True, **MAGNITUDES}),
    ],
)
def test_what_adapters_change_of_the_vocabulary(make_model, family, vocab_size, edit, limits):
    """Guards against rows of another slot's tables or of another token, norms of another number, logits of a model's
    head, flags, ranks and magnitudes of the adapter that a slot had before, pairs behind a scale of embeddings, behind
    a cap of logits or over the end of a vocabulary: in captured steps, parts of prompts, both in one pass, and scored
    prompts.
    """
    folder = make_model(family, num_hidden_layers=2, vocab_size=vocab_size).folder
    served = Served(folder, fastest, edit=edit, mixed_tokens=4, **limits)
    served.check_logits()
    run = Ahead(served.late)
    run.adapters = NAMED
    for slot, prompt in PROMPTS.items():
        run.start(slot, prompt, TABLES[slot])
        while run.computed[slot] < len(prompt):
            run.launch([*range(slot), slot], 9)
    run.launch(list(PROMPTS))
    run.launch(list(PROMPTS))
    assert [run.generated(slot)[:3] for slot in PROMPTS] == [served.expected(slot, 3) for slot in PROMPTS]

    scored = Row(PROMPTS[0], 0, TABLES[0], DRAW, 0, PromptTargets(2, PROMPTS[0][3:], 2), adapter=0)
    late, plain = served.late.launch([scored]), served.by_adapter[0].launch([scored._replace(adapter=None)])
    assert [entry.token_ids for entry in late.read()] == [entry.token_ids for entry in plain.read()]
    for one, other in zip(late.prompt_logprobs[0], plain.prompt_logprobs[0], strict=True):
        assert (one.rank, one.logprob) == (other.rank, pytest.approx(other.logprob, abs=1e-3))

    own = random_adapter(served.config, [8], 5)
    assert served.late.adapters.fill(0, served.late.adapters.prepare(own)).done
    run.start(2, PROMPTS[2], TABLES[2])
    for _ in range(3):
        run.launch([2])
    alone = merged_runner(served.config, served.weights, own, BLOCK)
    assert run.generated(2)[:3] == one_after_the_other(alone, PROMPTS[2], TABLES[2], 3)


def with_token_rows(adapter: Adapter, config: ModelConfig) -> Adapter:
    """With rows of three tokens of a tied model, of which two are in a prompt with this adapter."""
    rows = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(5)) * 0.3
    tensors = {f"base_model.model.{EMBEDDING}{ENDING}": rows}
    tokens = {"embed_tokens": (20, 50, 7)}
    pairs = take_token_rows(tensors, config, tokens, lambda name, numbers: torch.zeros_like(rows))
    return replace(adapter, embedding=pairs[EMBEDDING], lm_head=(pairs[LM_HEAD],))


def test_rows_of_tokens(make_model):
    """Guards against the row of another token, and rows of a tied model that one of its uses lacks."""
    folder = make_model("gemma2", num_hidden_layers=1, vocab_size=163).folder
    served = Served(folder, fastest, edit=with_token_rows, adapter_vocabulary=True)
    served.check_logits()


@pytest.mark.parametrize(
    ("family", "config", "edit", "limits"),
    [
        ("llama", {}, with_scaled_vocabulary, {"adapter_vocabulary": True, **MAGNITUDES}),
        ("qwen3_moe", FEW_EXPERTS, with_experts, EXPERTS),
        ("qwen2_moe", FEW_EXPERTS, with_scaled_routers, SCALED_ROUTERS),
        (
            "deepseek_v2",
            LATENT | {"q_lora_rank": None, "v_head_dim": 16, "moe_intermediate_size": 32},
            with_scaled_latents,
            LATENTS | MAGNITUDES,
        ),
    ],
)
def test_deterministic_logits_do_not_depend_on_the_batch(make_model, family, config, edit, limits):
    """Guards against what an adapter changes in other parts or another order beside other rows, and against what it
    changes of a row without one."""
    folder = make_model(family, **{"num_hidden_layers": 1, "vocab_size": 176, **config}).folder
    served = Served(folder, invariant, edit, deterministic=True, **limits)
    rows = [Row(PROMPTS[slot], 0, TABLES[slot], DRAW, slot, adapter=NAMED.get(slot)) for slot in PROMPTS]
    together = served.late.logits(rows).clone()
    for index, row in enumerate(rows):
        assert torch.equal(served.late.logits([row])[0], together[index])


def test_adapters_that_no_kernel_runs_are_refused(make_model):
    """Guards against an adapter of which a part is left out."""
    config = ModelConfig.from_folder(make_model("llama", num_hidden_layers=1).folder)
    prepare = BankSlots(BankShape(BankLayout.of(config), 2, 32, torch.bfloat16), LateQueue()).prepare
    pair = LowRank(torch.zeros(4, 64), torch.zeros(64, 4))
    with pytest.raises(AdapterError, match=r"of the embedding or the head, .* room with --lora-room vocabulary"):
        prepare(Adapter(b"", (LayerAdapter(),), lm_head=(pair,)))
    with pytest.raises(AdapterError, match=r"of the embedding or the head, .* room with --lora-room vocabulary"):
        prepare(Adapter(b"", (LayerAdapter(),), embedding=pair))
    experts = LowRank(torch.zeros(8, 4, 64), torch.zeros(8, 64, 4))
    with pytest.raises(AdapterError, match=r"routed experts.* their pairs are 8,192 bytes"):
        prepare(Adapter(b"", (LayerAdapter(expert_down=(experts,)),)))
    for family, product, module, reason in (
        ("qwen2_moe", "router", "mlp.gate", "for which .* --lora-room routers"),
        ("qwen2_moe", "shared_gate", "mlp.shared_expert_gate", "for which .* --lora-room routers"),
        ("deepseek_v3", "kv_up", "self_attn.kv_b_proj", "for which .* --lora-room kv_b_proj"),
    ):
        few = LATENT | {"num_hidden_layers": 1, "num_experts": 4, "head_dim": 16, "q_lora_rank": 32, "v_head_dim": 16}
        of_cpus = BankLayout.of(ModelConfig.from_folder(make_model(family, **few).folder))
        with pytest.raises(AdapterError, match=f"adapts model.layers.0.{module}, {reason}"):
            BankSlots(BankShape(of_cpus, 2, 32, torch.bfloat16), LateQueue()).prepare(
                Adapter(b"", (LayerAdapter(**{product: (pair,)}),))
            )
    with pytest.raises(AdapterError, match=r"magnitudes .* room with --lora-room dora"):
        prepare(Adapter(b"", (LayerAdapter(o=(pair._replace(row_scale=torch.ones(64)),)),)))
    with pytest.raises(AdapterError, match="room with --lora-room modules_to_save"):
        prepare(Adapter(b"", (LayerAdapter(),), norms={0: torch.ones(64)}))
    with pytest.raises(AdapterError, match="rank 48, more than --max-lora-rank 32"):
        prepare(random_adapter(config, [48], 1))
    broken = random_adapter(config, [4], 1)
    broken.layers[0].o[0].b[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="not finite"):
        prepare(broken)
