"""Adapters on a GPU: their kernels at the shapes of an 8B model, and steps that mix them, against merged weights.

Run it in a separate process: tests/unit/models would then run on the GPU as well.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import DenseLinear, ExpertLinears
from baton.kernels.routing import Routing
from baton.kernels.triton import linear, low_rank, norm
from baton.kernels.triton.decode_plan import split_plan
from baton.kernels.triton.expert_pairs import ExpertPairs
from baton.kernels.triton.experts_policy import row_tiles, rows_tiles
from baton.kernels.triton.latent_decode import head_tiles
from baton.kernels.triton.linear_policy import FASTEST, GATE_UP_8B, INVARIANT, O_8B, QKV_8B, ProductShape
from baton.kernels.triton.low_rank import AdapterBank, BankSite
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products.experts_dense import DenseExperts
from baton.models.cuda.products.experts_sizes import ExpertsSizes
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.weights import load_weights
from baton.node.modelhub import locate_model
from baton.tests.gpu.test_runner import make, prompts, table
from baton.tests.unit.kernels import adapter_checks as checks
from baton.tests.unit.kernels import latent_checks
from baton.tests.unit.kernels.expert_checks import routes_of, some_logits
from baton.tests.unit.kernels.expert_pair_checks import check_experts_added
from baton.tests.unit.kernels.kernel_checks import error
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

pytestmark = pytest.mark.gpu

GPU, BF16 = "cuda", torch.bfloat16
QKV_ENDS = (4096, 5120, 6144)
RANKS = {16: [16, 0, 16, 16], 64: [64, 16, 32, 0]}
SMALL = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}
FAMILIES = {
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 256},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "head_dim": 32,
    },
}


@pytest.mark.parametrize("rows", [1, 17, 64, 256, 1000])
def test_rows_are_grouped(rows):
    """Guards what one program of many warps writes for others of its threads."""
    for num_slots in (1, 8, 64):
        checks.check_group(checks.some_adapters(rows, num_slots, GPU, rows), num_slots)


@pytest.mark.parametrize("max_rank", [16, 64])
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_expand(rows, max_rank):
    for dtype in (BF16, torch.float32):
        checks.check_expand(GPU, dtype, rows, RANKS[max_rank], max_rank, 4096, QKV_ENDS, pdl=True)
    checks.check_expand(GPU, BF16, rows, RANKS[max_rank], max_rank, 14336, (4096,))


@pytest.mark.parametrize("max_rank", [16, 64])
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_what_is_added_to_embeddings_and_logits(rows, max_rank):
    """Guards a vocabulary in whole tiles and in others."""
    for dtype in (BF16, torch.float32):
        checks.check_embed(GPU, dtype, rows, RANKS[max_rank], max_rank, 32064, 4096)
    for vocab in (128256, 49155):
        checks.check_expand(GPU, BF16, rows, RANKS[max_rank], max_rank, 4096, (vocab,))


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_products_in_memory_are_scaled(rows):
    for dtype, splits in ((BF16, 1), (BF16, 4), (torch.float32, 1)):
        checks.check_add_in_place(GPU, dtype, rows, RANKS[64], 64, 4096, QKV_ENDS, splits, pdl=True)


@pytest.mark.parametrize(("max_rank", "scaled"), [(16, False), (64, False), (16, True)])
@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_products_that_add(rows, max_rank, scaled):
    """Guards the tables' tiles, alone and in a chain of early launches, and bits that no neighbour changes."""
    for policy in (FASTEST, INVARIANT):
        tiles = policy[min(size for size in policy if rows <= size)]
        for shape, ends, fused in (
            (QKV_8B, QKV_ENDS, False),
            (O_8B, (4096,), False),
            (GATE_UP_8B, (14336, 28672), True),
        ):
            checks.check_linear_added(
                GPU, BF16, rows, RANKS[max_rank], max_rank, tiles[shape], ends, 4096, fused, scaled, pdl=True
            )


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_products_beside_what_they_add_read_what_the_launches_before_wrote(rows):
    """Guards against a product that begins before x is there, and one that adds what another is still writing: layers
    in a captured chain of early launches have the bits that they have one after the other."""
    queue, num_layers, size = CudaQueue(0), 24, 4096
    adapters = checks.Adapters.make(RANKS[16], 16, size, (size,), BF16, GPU)
    named = checks.some_adapters(rows, 4, GPU) if rows > 1 else torch.zeros(1, dtype=torch.int32, device=GPU)
    grouped = checks.group(named, 4)
    tiles = FASTEST[min(most for most in FASTEST if rows <= most)][O_8B]
    splits = low_rank.splits_of(size, rows, deterministic=False)
    hidden = torch.zeros(splits, rows, 16, device=GPU)
    memory = torch.zeros(rows * size, dtype=BF16, device=GPU)
    start = torch.randn(rows, size, device=GPU).to(BF16)
    weight, scale = (torch.randn(size, size, device=GPU) / 64).to(BF16), torch.ones(size, dtype=BF16, device=GPU)
    residual, normed = torch.empty_like(start), torch.empty_like(start)
    out = start.clone()
    if tiles.splits > 1:
        out = torch.zeros(tiles.splits, rows, size, device=GPU)

    def layers(pdl: bool) -> None:
        residual.copy_(start)
        out.zero_()
        for _ in range(num_layers):
            norm.add_rms_norm(out, residual, scale, 1e-5, normed, pdl=pdl)
            added = low_rank.shrink(normed, adapters.bank, adapters.site, grouped, hidden, memory, beside=True, pdl=pdl)
            linear.linear(normed, weight, None, tiles, out, added=added.apart(pdl=pdl), pdl=pdl)

    torch.cuda.synchronize()
    queue.enqueue(lambda: layers(pdl=False))
    queue.mark().wait()
    expected = residual.clone(), out.clone()
    torch.cuda.synchronize()
    chain = queue.capture(lambda: layers(pdl=True))
    for _ in range(20):
        queue.enqueue(chain)
        queue.mark().wait()
        assert torch.equal(residual, expected[0]) and torch.equal(out, expected[1])


@pytest.mark.parametrize(("num_tokens", "tile_m"), [(1, 0), (8, 16), (200, 64)])
def test_experts_that_add(num_tokens, tile_m):
    """Guards choices of a token that are computed apart, and early launches that read what is not there yet."""
    routing, (n, k) = Routing(32, 4), (768, 2048)
    for dtype in (BF16, torch.float32):
        shape = ProductShape(n, k, True)
        tiles = rows_tiles(shape, tile_m, 32, dtype.itemsize) if tile_m else row_tiles(shape)
        assert tiles is not None
        check_experts_added(GPU, dtype, num_tokens, routing, n, k, tiles, [16, 0, 32], 32, range(8, 32), pdl=True)


def test_experts_of_prompts_beside_adapters_are_those_without():
    """Guards against tiles of another number of rows than the products of steps with adapters have."""
    count, num_tokens, hidden, width = 8, 400, 512, 256
    routing = Routing(count, 2)
    products = DenseExperts(ExpertsSizes(routing, range(count), hidden, width), 512, False, BF16, GPU, 2 * 16)

    def experts(outputs: int, inputs: int) -> ExpertLinears:
        weight = torch.randn(count * outputs, inputs, device=GPU) / inputs**0.5
        return ExpertLinears(DenseLinear(weight.to(BF16)), count)

    gate_up, down = experts(2 * width, hidden), experts(hidden, width)
    x, logits = torch.randn(num_tokens, hidden, device=GPU).to(BF16), some_logits(num_tokens, count, False)
    ranks, none = (torch.full((size,), value, dtype=torch.int32, device=GPU) for size, value in ((2, 0), (400, -1)))
    bank = AdapterBank(torch.zeros(1, 1024, dtype=BF16, device=GPU), ranks.view(1, 2), 16)
    sites = BankSite(0, 0, 0, hidden, (width, 2 * width)), BankSite(1, 0, 0, width, (hidden,))
    first, second = (ExpertPairs(bank, site, none) for site in sites)
    found = []
    for pairs in (None, (first, second)):
        tile_rows = products.tile_rows(num_tokens, adapted=pairs is not None)
        routes = routes_of(logits, routing, tile_rows, GPU)
        rows = products(gate_up, down, x, routes, pairs, pdl=False)
        found.append(rows[routes.positions.long()].double())
    assert error(found[1], found[0]) < 0.01


@pytest.mark.parametrize("scaled", [False, True])
def test_what_adapters_change_of_keys_and_values_of_latents(scaled):
    """Guards early launches beside attention, and tiles of the sizes of DeepSeek-V2-Lite."""
    lengths, new, plan = [70, 1, 1500, 40], [70, 1, 200, 40], split_plan(4, head_tiles(16), 132)
    latent_checks.check_latent_pairs(
        GPU, BF16, latent_checks.LITE, lengths, new, 64, 1024, plan, [32, 0, 16], 32, scaled, pdl=True
    )


class Mixed:
    """A runner of the demo model, or of a folder's, with three adapters in four slots; the first and the third have
    pairs of the vocabulary, magnitudes, and whole copies, where slots have room for them."""

    def __init__(self, dtype: torch.dtype, max_rows: int, folder: Path | None = None, **limits) -> None:
        self.folder, self.most_drafts = folder or locate_model("demo"), limits.get("most_drafts", 0)
        self.config = ModelConfig.from_folder(self.folder)
        weights = load_weights(self.config, self.folder, dtype, "cuda:0", pack=False)
        step_limits = StepLimits(max_rows, 2048, **{"adapter_slots": 4, "max_rank": 64, **limits})
        self.runner = CudaRunner(self.config, weights, CudaQueue(0), step_limits, 640)
        made = ([16], ()), ([8, 40, 3], ("down",)), ([64], ("qkv", "o"))
        self.adapters = [
            random_adapter(self.config, ranks, seed, without) for seed, (ranks, without) in enumerate(made)
        ]
        if limits.get("adapter_vocabulary"):
            first, second, third = self.adapters
            self.adapters = [with_vocabulary(first, self.config), second, with_vocabulary(third, self.config)]
        if limits.get("adapter_wholes"):
            first, second, third = self.adapters
            self.adapters = [with_wholes(first, self.config), second, with_wholes(third, self.config)]
        if limits.get("adapter_routers"):
            self.adapters = [with_routers(adapter, self.config) for adapter in self.adapters]
        if limits.get("adapter_latents"):
            self.adapters = [with_latents(adapter, self.config) for adapter in self.adapters]
        if limits.get("adapter_experts"):
            self.adapters = [with_experts(adapter, self.config) for adapter in self.adapters]
        if limits.get("adapter_magnitudes"):
            first, second, third = self.adapters
            self.adapters = [with_magnitudes(first, self.config), second, with_magnitudes(third, self.config)]
        for slot in range(len(self.adapters)):
            self.fill(slot, slot)
        config = self.config
        shape = (max_rows * 10 + 1, config.num_kv_heads, config.num_layers, config.kv_planes, 64, config.head_dim)
        self.runner.bind_pool(torch.zeros(shape, dtype=dtype, device="cuda:0"), 640)

    def fill(self, slot: int, adapter: int) -> None:
        filled = self.runner.adapters.fill(slot, self.runner.adapters.prepare(self.adapters[adapter]))
        while not filled.done:
            pass

    def generate(
        self, made: list[list[int]], named: dict[int, int], count: int, chunk: int, **params
    ) -> list[list[int]]:
        """As test_runner's; named: adapters by sequence."""
        run, done = Ahead(self.runner, self.most_drafts), []
        run.adapters = named
        for slot, prompt in enumerate(made):
            run.start(slot, prompt, table(slot), **{**params, "seed": slot + 1})
            while run.computed[slot] < len(prompt):
                run.launch([slot, *done[-3:]], chunk)
            done.append(slot)
        while any(len(run.known[slot]) < len(made[slot]) + count for slot in done):
            run.launch(done)
        return [run.generated(slot)[:count] for slot in done]

    def check(self, made: list[list[int]], named: dict[int, int], found: list[list[int]]) -> None:
        """Against the CPU's tokens, each sequence alone."""
        plain = load_weights(self.config, self.folder, torch.float32, pack=False)
        alone = {
            each: merged_runner(self.config, plain, None if each is None else self.adapters[each], 16)
            for each in (None, 0, 1, 2)
        }
        for slot, (prompt, tokens) in enumerate(zip(made, found, strict=True)):
            one = one_after_the_other(alone[named.get(slot)], prompt, list(range(1, 41)), len(tokens))
            assert tokens == one, slot


@pytest.mark.parametrize(
    ("chunk", "limits"),
    [
        (100, {}),
        (300, {"most_drafts": 4}),
        (100, {"adapter_vocabulary": True}),
        (300, {"adapter_vocabulary": True, "most_drafts": 4}),
        (100, {"adapter_magnitudes": True, "adapter_vocabulary": True}),
        (300, {"adapter_wholes": True}),
    ],
)
def test_tokens_of_mixed_batches_equal_those_of_merged_weights(chunk, limits):
    """Guards the whole: captured steps, parts of prompts, steps of both, and drafts, in float32 against the CPU."""
    mixed, made = Mixed(torch.float32, 8, **limits), prompts(7)
    named = {slot: slot % 4 for slot in range(7) if slot % 4 < 3}
    mixed.check(made, named, mixed.generate(made, named, 24, chunk))


@pytest.mark.parametrize(
    ("family", "limits"),
    [
        ("qwen2_moe", {}),
        ("deepseek_v3", {}),
        ("qwen2_moe", {"adapter_routers": True, "adapter_magnitudes": True}),
        ("deepseek_v3", {"adapter_routers": True}),
        ("deepseek_v3", {"adapter_latents": True}),
        ("deepseek_v3", {"adapter_latents": True, "adapter_magnitudes": True}),
        ("qwen2_moe", {"adapter_routers": True, "adapter_experts": True}),
    ],
)
def test_tokens_beside_experts_equal_those_of_merged_weights(tmp_path, family, limits):
    """Guards what adapters add to shared experts, beside routed ones, to routers, and to latent attention."""
    transformers = pytest.importorskip("transformers", reason="it makes the models")
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        spread = torch.randn_like(parameter) * 0.05
        parameter.data = 1 + spread if "norm" in name else spread
    model.save_pretrained(tmp_path)
    mixed, made, named = Mixed(torch.float32, 4, tmp_path, **limits), prompts(4), {0: 0, 1: 1, 2: 2}
    mixed.check(made, named, mixed.generate(made, named, 12, 100))


@pytest.mark.parametrize(
    "limits", [{}, {"adapter_vocabulary": True}, {"adapter_vocabulary": True, "adapter_magnitudes": True}]
)
def test_deterministic_tokens_do_not_depend_on_the_batch(limits):
    """Guards --deterministic with adapters: each sequence alone, in other chunks, with other neighbours, and without
    slots at all where it has no adapter."""
    made, chance = prompts(40, longest=590), random.Random(2)
    mixed = Mixed(BF16, 40, deterministic=True, **limits)
    named = {slot: chance.randrange(3) for slot in range(40) if slot % 5}
    together = mixed.generate(made, named, 24, 96, temperature=0.8)
    assert together == mixed.generate(made, named, 24, 256, temperature=0.8)
    without = make(locate_model("demo"), BF16, max_rows=40, deterministic=True)
    for slot in (0, 1, 2, 3, 15):
        for runner in (mixed.runner, without) if slot not in named else (mixed.runner,):
            run = Ahead(runner)
            run.adapters = named
            run.start(slot, made[slot], table(slot), temperature=0.8, seed=slot + 1)
            while len(run.known[slot]) < len(made[slot]) + 24:
                run.launch([slot], 77)
            assert run.generated(slot)[:24] == together[slot], slot


@pytest.mark.parametrize(
    "limits", [{}, {"adapter_vocabulary": True}, {"adapter_magnitudes": True}, {"adapter_wholes": True}]
)
def test_slots_are_filled_beside_steps(limits):
    """Guards against a fill that steps of other slots see, one that a step waits for, and pairs that a slot had."""
    mixed, made = Mixed(BF16, 8, deterministic=True, **limits), prompts(6)
    named = {slot: slot % 3 for slot in range(6)}
    expected = mixed.generate(made, named, 40, 100)
    images = [mixed.runner.adapters.prepare(adapter) for adapter in mixed.adapters]
    launch, fills = mixed.runner.launch, []

    def launch_and_fill(rows, entering=None):
        fills.append(mixed.runner.adapters.fill(3, images[len(fills) % 3]))
        return launch(rows)

    mixed.runner.launch = launch_and_fill
    assert mixed.generate(made, named, 40, 100) == expected
    mixed.runner.launch = launch
    assert len(fills) > 40
    while not fills[-1].done:
        pass
    last = (len(fills) - 1) % 3
    again = mixed.generate([made[last]], {0: 3}, 40, 100)
    assert again == mixed.generate([made[last]], {0: last}, 40, 100)
