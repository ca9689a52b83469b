"""The ranks of a group compute what one rank computes: the same tokens, log probabilities and KV, whatever is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import baton
from baton.models.batch import Draw, Drawn, PromptTargets, Row
from baton.models.cpu.runner import ModelRunner
from baton.models.drafts import Drafts
from baton.node.errors import PeerLost, SettingsError
from baton.node.messages.control import SamplingSpec
from baton.testing.rank_threads import RankThreads
from baton.tests.unit.models.conftest import LATENT
from baton.tests.unit.models.eagle_folders import write_pair

BLOCK_TOKENS = 16
TOKENS = 6
SHAPE = {"num_attention_heads": 8, "hidden_size": 64, "intermediate_size": 96}
SPECS = [
    SamplingSpec(max_tokens=99, temperature=0.0),
    SamplingSpec(max_tokens=99, temperature=0.8, seed=5),
    SamplingSpec(max_tokens=99, temperature=1.3, seed=1 << 40),
    SamplingSpec(max_tokens=99, temperature=0.9, seed=6, top_p=0.9, top_k=20, frequency_penalty=0.5),
    SamplingSpec(max_tokens=99, temperature=0.0, logprobs=True, top_logprobs=3, repetition_penalty=1.2),
]
DEMO = Path(baton.__file__).parent / "models" / "demo"


class LastTokens:
    """A drafter that always has something to say."""

    def propose(self, draw: Draw, most: int) -> Drafts:
        return Drafts(tuple(draw.history[-most:]))


def serve(runner, prompts: list[list[int]], pool: torch.Tensor) -> tuple[list[list[Drawn]], object]:
    """All prompts at once, each with a spec of its own and in two chunks; and the log probabilities of the first."""
    width = len(pool) // len(prompts)
    tables = [list(range(index * width, (index + 1) * width)) for index in range(len(prompts))]
    runner.bind_pool(pool)
    half = len(prompts[0]) // 2
    runner.step([Row(prompt[:half], 0, table, None) for prompt, table in zip(prompts, tables, strict=True)])
    known, drawn = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    targets = PromptTargets(0, prompts[0][half + 1 :], 2)
    scores = None
    for step in range(TOKENS):
        rows = [
            Row(
                tokens[half:] if step == 0 else tokens[-1:],
                half if step == 0 else len(tokens) - 1,
                table,
                Draw(spec, tokens, len(prompts[0]), step),
                targets=targets if index == step == 0 else None,
                most_drafts=3 if index == 0 and step else 0,
            )
            for index, (tokens, table, spec) in enumerate(zip(known, tables, SPECS, strict=True))
        ]
        launched = runner.launch(rows)
        for index, entry in enumerate(launched.read()):
            known[index] += entry.token_ids
            drawn[index].append(entry)
        scores = scores or launched.prompt_logprobs[0]
    return drawn, scores


def check_group(folder: Path, count: int, **options: object) -> RankThreads:
    def load(**more: object) -> ModelRunner:
        return ModelRunner.load(folder, **options, **more)

    alone = load()
    vocab_size = alone.config.vocab_size
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(2, vocab_size, (len(SPECS), 37), generator=generator).tolist()
    pools = [torch.zeros(alone.kv_shape(6 * len(SPECS), BLOCK_TOKENS)) for _ in range(2)]
    alone.drafter = LastTokens()
    expected, scores = serve(alone, prompts, pools[0])
    group = RankThreads(lambda peers: load(peers=peers), count)
    group.runners[0].drafter = LastTokens()
    found, found_scores = serve(group, prompts, pools[1])
    assert any(each.num_drafts for each in expected[0])
    for one, other in zip(found, expected, strict=True):
        assert [each.token_ids for each in one] == [each.token_ids for each in other]
        for mine, theirs in zip(one, other, strict=True):
            assert [each.logprob for each in mine.logprobs] == pytest.approx(
                [each.logprob for each in theirs.logprobs], abs=1e-3
            )
    assert [each.rank for each in found_scores] == [each.rank for each in scores]
    torch.testing.assert_close(pools[1], pools[0], rtol=1e-3, atol=1e-3)
    return group


@pytest.mark.parametrize(("count", "kv_heads"), [(2, 8), (4, 1), (4, 4), (8, 2)])
def test_tokens_of_a_group_are_those_of_one_rank(make_model, count, kv_heads):
    """Guards against cut heads, biases added by every rank, sums left out, and a vocabulary's part drawn with the noise
    of another; with fewer key heads than ranks too."""
    folder = make_model("qwen2", **SHAPE, num_key_value_heads=kv_heads).folder
    group = check_group(folder, count)
    assert {peers.num_sums for peers in group.peers} == {2 * 3 * (TOKENS + 1)}, "two sums a layer and step"


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("phi3", {"pad_token_id": 0, "sliding_window": 19}),
        ("gemma2", {"sliding_window": 19}),
        ("gemma3", {"sliding_window": 19, "tie_word_embeddings": True}),
        (
            "qwen2_moe",
            {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
        ),
        ("deepseek_v3", LATENT | {"num_key_value_heads": 8}),
        ("gpt_oss", {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 19}),
    ],
)
def test_every_family_can_be_cut(make_model, family, fields):
    """Guards against what a family has of its own: merged projections, norms of heads and outputs, softcaps, windows,
    biases behind the sum, experts of which each rank has some, sinks, and a latent that all ranks have."""
    check_group(make_model(family, **SHAPE, **fields).folder, 2)


def test_the_demo_model_can_be_cut():
    """Guards against a group of the model that everybody tries first, whose 2 key heads 4 ranks share."""
    check_group(DEMO, 4)


def test_plain_draws_exchange_eight_bytes_a_row_and_rank(make_model):
    """Guards against gathered logits: 512 KB a row for a large vocabulary, where 8 bytes do."""
    group = RankThreads(lambda peers: ModelRunner.load(make_model("llama").folder, peers=peers), 2)
    group.bind_pool(torch.zeros(group.runners[0].kv_shape(4, BLOCK_TOKENS)))
    draws = [Draw(spec, (), 0, 0) for spec in SPECS[:3]]
    group.step([Row([1, 2, 3], 0, [block], draw) for block, draw in enumerate(draws)])
    assert [peers.num_gathered_bytes for peers in group.peers] == [8 * 3, 8 * 3]


def test_quantised_kv_of_a_group_is_that_of_one_rank(make_model, sequences, prompt):
    """Guards against scales of another rank's heads."""
    folder = make_model("llama").folder
    alone = ModelRunner.load(folder, kv_dtype="fp8")
    group = RankThreads(lambda peers: ModelRunner.load(folder, kv_dtype="fp8", peers=peers), 2)
    pools = []
    for runner in (alone, group):
        made = sequences(runner, 1, 64)
        runner.step([Row(prompt, 0, made.tables[0], None)])
        pools.append(made.pool)
    torch.testing.assert_close(pools[1].scales, pools[0].scales, rtol=1e-3, atol=1e-5)


def test_a_rank_that_fails_fails_the_step(make_model):
    """Guards against ranks that wait for one that has ended."""
    group = RankThreads(lambda peers: ModelRunner.load(make_model("llama").folder, peers=peers), 2)
    group.runners[0].bind_pool(torch.zeros(group.runners[0].kv_shape(4, BLOCK_TOKENS)))
    with pytest.raises(PeerLost):  # the other has no pool
        group.step([Row([1, 2, 3], 0, [0], Draw(SPECS[0], (), 0, 0))])


def test_what_cannot_be_cut_is_refused(make_model):
    folder = make_model("llama").folder
    with pytest.raises(SettingsError, match="4 query heads cannot be shared out to 8 ranks"):
        RankThreads(lambda peers: ModelRunner.load(folder, peers=peers), 8)


def test_norms_of_all_heads_together_are_refused(make_model):
    """Guards against a rank that norms its heads alone."""
    folder = make_model("olmoe", head_dim=12).folder
    with pytest.raises(SettingsError, match="norms all heads of a token together"):
        RankThreads(lambda peers: ModelRunner.load(folder, peers=peers), 2)


@pytest.mark.parametrize("count", [2, 4])
def test_a_draft_of_a_group_is_that_of_one_rank(tmp_path, count):
    """Guards against a draft's layer of which only rank 0's heads are written, pools of other sizes, and ranks that
    wait for a draft: it equals its model, so that all of its tokens are right; of random draws, and of some that rank 0
    makes alone."""
    write_pair(tmp_path / "model", tmp_path / "draft")
    specs = [SPECS[1], SamplingSpec(max_tokens=99, temperature=0.9, seed=6, top_k=9)]
    prompts, tables = [[*range(3, 24)], [*range(9, 30)]], [[0, 1, 2], [3, 4, 5]]

    def load(**more: object) -> ModelRunner:
        return ModelRunner.load(tmp_path / "model", eagle=tmp_path / "draft", most_drafts=3, **more)

    def served(runner) -> tuple[list[list[int]], int, torch.Tensor]:
        pool = torch.zeros(alone.kv_shape(6, BLOCK_TOKENS))
        runner.bind_pool(pool)
        known, starts, num_drafts = [list(prompt) for prompt in prompts], [0, 0], 0
        for step in range(5):
            draws = [Draw(spec, ids, 21, len(ids) - 21) for spec, ids in zip(specs, known, strict=True)]
            rows = [
                Row(known[slot][starts[slot] :], starts[slot], tables[slot], draws[slot], slot, None, 3 * (step > 0))
                for slot in (0, 1)
            ]
            starts = [len(ids) for ids in known]
            for slot, entry in enumerate(runner.step(rows)):
                known[slot] += entry.token_ids
                starts[slot] += len(entry.token_ids) - 1
                num_drafts += entry.num_drafts
        return known, num_drafts, pool

    alone = load()
    expected, num_drafts, pool = served(alone)
    assert sum(map(len, expected)) == 42 + 2 * 5 + num_drafts > 42 + 2 * 5, "all drafts are right"
    found, num_found, group_pool = served(RankThreads(lambda peers: load(peers=peers), count))
    assert (found, num_found) == (expected, num_drafts)
    torch.testing.assert_close(group_pool, pool, rtol=1e-3, atol=1e-3)
    assert pool[:, :, -1].any()
