"""Ranks of a group whose kernels exchange words, interpreted: they draw what one rank on a CPU draws."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import fastest
from baton.models.cuda.rank_adapters import RankSlots
from baton.models.eagle_config import read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.partition import Rank
from baton.models.weights import load_weights
from baton.testing.device_ranks import DeviceRanks
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.conftest import kv_pool
from baton.tests.unit.models.cuda.ahead import GRAMMAR, Ahead, one_after_the_other
from baton.tests.unit.models.cuda.merged import (
    merged_runner,
    random_adapter,
    with_experts,
    with_magnitudes,
    with_routers,
    with_vocabulary,
    with_wholes,
)
from baton.tests.unit.models.cuda.test_runner import PROMPTS, TABLES, split_in_two
from baton.tests.unit.models.eagle_folders import write_pair

BLOCK = 16
SMALL = {"num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def make(folder, count, policy=fastest, **limits) -> tuple[DeviceRanks, ModelRunner]:
    plain = ModelRunner.load(folder)
    plain.bind_pool(*kv_pool(plain, 24, BLOCK))
    config = plain.config
    ranks = DeviceRanks(
        config,
        lambda rank: load_weights(config, folder, torch.float32, pack=False, rank=rank),
        [LateQueue() for _ in range(count)],
        StepLimits(2, 32, **limits),
        96,
        policy,
    )
    heads = len(Rank(0, count).key_heads(config.num_kv_heads))
    pools = [torch.zeros(24, heads, config.num_layers, 2, BLOCK, config.head_dim) for _ in range(count)]
    ranks.bind_pools(pools, 96)
    return ranks, plain


def with_all_of_experts(adapter, config):
    return with_routers(with_experts(adapter, config), config)


def split(num_rows, shape):
    return split_in_two(num_rows, shape) if shape.outputs % 16 == 0 else None


def test_ranks_draw_what_one_rank_draws(make_model):
    """Guards what each rank computes, the sums of split parts, one KV head that two ranks hold, a vocabulary that ranks
    share unevenly, draws by all ranks and draws that need all logits, and steps in flight: ranks that draw different
    tokens, or an exchange that only one makes."""
    ranks, plain = make(make_model("qwen2", vocab_size=67, num_key_value_heads=1, **SMALL).folder, 2, split)
    run = Ahead(ranks)
    edited = {"temperature": 0.7, "top_p": 0.93, "seed": 3, "frequency_penalty": 1.6}
    random = {"temperature": 1.1, "seed": (5 << 33) + 7}
    run.start(0, PROMPTS[0], TABLES[0])
    run.start(1, PROMPTS[1], TABLES[1], **random)
    run.launch([0, 1], chunk=9)  # a part of one prompt that draws nothing, beside the whole of another
    run.launch([0, 1], chunk=9)
    run.launch([1, 0])
    found = [run.generated(0), run.generated(1)]
    run.start(1, PROMPTS[2], TABLES[2], **edited)
    run.launch([1])
    run.launch([1, 0])
    found.append(run.generated(1))
    assert [len(tokens) for tokens in found] == [2, 3, 2]
    for name, spec in enumerate(({}, random, edited)):
        assert found[name] == one_after_the_other(plain, PROMPTS[name], TABLES[name], len(found[name]), **spec)


def test_ranks_hold_the_same_drafts(make_model):
    """Guards against ranks that verify or propose other drafts: more tokens of one row in a step of one rank than in
    that of another, and tokens that are not those without drafts; then by masks, with forced tokens."""
    model = make_model("qwen2", vocab_size=67, num_key_value_heads=1, **SMALL)
    ranks, plain = make(model.folder, 2, most_drafts=2)
    expected = one_after_the_other(plain, PROMPTS[0], TABLES[0], 6)
    run = Ahead(ranks, most_drafts=2)
    run.predictions[0] = [*PROMPTS[0][-3:], *expected, *expected]
    run.start(0, PROMPTS[0], TABLES[0])
    while len(run.known[0]) < len(PROMPTS[0]) + 5:
        run.launch([0])
    assert run.generated(0)[:5] == expected[:5] and run.num_accepted
    run.forced = {place: 3 * place % 67 for place in range(len(PROMPTS[0]) + 1, len(PROMPTS[0]) + 5)}
    expected = one_after_the_other(plain, PROMPTS[0], TABLES[0], 6, run.forced, grammar=GRAMMAR)
    run.predictions.clear()
    run.start(0, PROMPTS[0], TABLES[0], grammar=GRAMMAR)
    while len(run.known[0]) < len(PROMPTS[0]) + 6:
        run.launch([0])
    assert run.generated(0)[:6] == expected and run.sources["grammar"]


@pytest.mark.parametrize(
    ("family", "edit", "limits"),
    [
        ("qwen2", with_wholes, {"adapter_wholes": True}),
        ("qwen2", with_vocabulary, {"adapter_vocabulary": True}),
        ("qwen2", with_magnitudes, {"adapter_magnitudes": True}),
        ("qwen3_moe", with_all_of_experts, {"adapter_routers": True, "adapter_experts": True}),
    ],
)
def test_ranks_compute_with_their_parts_of_an_adapter(make_model, family, edit, limits):
    """Guards against rows or columns of another rank's product, what an adapter adds to a sum twice, and another rank's
    part of its head or of its experts."""
    config = SMALL | (EXPERTS if family == "qwen3_moe" else {})
    folder = make_model(family, vocab_size=67, num_key_value_heads=1, **config).folder
    ranks, plain = make(folder, 2, adapter_slots=2, max_rank=16, **limits)
    adapter = edit(random_adapter(plain.config, [12, 5], 1), plain.config)
    slots = RankSlots(plain.config, [runner.adapters for runner in ranks.runners])
    assert slots.fill(1, slots.prepare(adapter)).done
    whole = load_weights(plain.config, folder, torch.float32, pack=False)
    expected = one_after_the_other(merged_runner(plain.config, whole, adapter, BLOCK), PROMPTS[0], TABLES[0], 3)
    assert expected != one_after_the_other(plain, PROMPTS[0], TABLES[0], 3)
    run = Ahead(ranks)
    run.adapters = {0: 1}
    run.start(0, PROMPTS[0], TABLES[0])
    for _ in range(3):
        run.launch([0])
    assert run.generated(0) == expected


def test_ranks_compute_their_parts_of_a_draft(tmp_path):
    """Guards against another rank's heads, rows or tokens of a draft, what ranks add up twice, and drafts that differ
    from rank to rank. The draft equals its model, so that all of its tokens are right."""
    model, folder, count = tmp_path / "model", tmp_path / "draft", 6
    write_pair(model, folder, num_layers=2)
    plain = ModelRunner.load(model)
    plain.bind_pool(*kv_pool(plain, 24, BLOCK))
    config = plain.config
    eagle = read_eagle(folder, config)
    ranks = DeviceRanks(
        config,
        lambda rank: load_weights(config, model, torch.float32, pack=False, rank=rank),
        [LateQueue() for _ in range(2)],
        StepLimits(2, 32, most_drafts=2),
        96,
        fastest,
        lambda rank, weights: (eagle, load_eagle(eagle, folder, weights, "auto", pack=False, rank=rank)),
    )
    heads, layers = len(Rank(0, 2).key_heads(config.num_kv_heads)), config.num_layers + 1
    ranks.bind_pools([torch.zeros(24, heads, layers, 2, BLOCK, config.head_dim) for _ in range(2)], 96)
    specs, prompts = ({}, {"temperature": 1.1, "seed": 6}), ([9, 8, 7, 6, 5, 4], [*range(1, 10)])
    run = Ahead(ranks, most_drafts=2)
    for slot, spec in enumerate(specs):
        run.start(slot, prompts[slot], [2 * slot, 2 * slot + 1], **spec)
    while any(len(run.known[slot]) < len(prompts[slot]) + count for slot in (0, 1)):
        run.launch([0, 1])
    for slot, spec in enumerate(specs):
        expected = one_after_the_other(plain, prompts[slot], [20, 21], count, **spec)
        assert run.generated(slot)[:count] == expected
    assert run.num_accepted == run.num_verified >= 4
