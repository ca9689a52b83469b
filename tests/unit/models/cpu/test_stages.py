"""The stages of a pipeline compute what one process computes: the same tokens, log probabilities and KV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from baton.kvtransfer.reshard import Cut
from baton.models.batch import Draw, Launched, PromptTargets, Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.partition import MAX_STAGES, Stage, check_stages
from baton.models.weights import load_weights
from baton.node.errors import SettingsError
from baton.node.messages.control import SamplingSpec
from baton.testing.rank_threads import RankThreads
from baton.tests.unit.models.conftest import LATENT

BLOCK_TOKENS, NUM_BLOCKS = 16, 12
SPECS = [
    SamplingSpec(max_tokens=9, temperature=0.0),
    SamplingSpec(max_tokens=9, temperature=0.8, seed=5),
    SamplingSpec(max_tokens=9, temperature=0.9, seed=6, top_p=0.9, top_k=20, repetition_penalty=1.5),
]
SHAPE = {"num_attention_heads": 8, "hidden_size": 64, "intermediate_size": 96}


class Pipeline:
    """Stages that compute each step one after the other, with the calls of a ModelRunner."""

    def __init__(self, folder: Path, count: int, ranks: int = 1, **options: object) -> None:
        def load(stage: Stage, **more: object) -> ModelRunner:
            return ModelRunner.load(folder, stage=stage, **options, **more)

        stages = [Stage(index, count) for index in range(count)]
        if ranks == 1:
            self.stages: list = [load(stage) for stage in stages]
        else:
            self.stages = [RankThreads(lambda peers, stage=stage: load(stage, peers=peers), ranks) for stage in stages]
        self.pools: list[torch.Tensor] = []

    def bind_pools(self) -> None:
        for each in self.stages:
            first = each.runners[0] if isinstance(each, RankThreads) else each
            self.pools.append(torch.zeros(first.kv_shape(NUM_BLOCKS, BLOCK_TOKENS)))
            each.bind_pool(self.pools[-1])

    def launch(self, rows: Sequence[Row]) -> Launched:
        entering = None
        for stage in self.stages[:-1]:
            entering = stage.advance(rows, entering)
        return self.stages[-1].launch(rows, entering)


def serve(runner: ModelRunner | Pipeline, prompts: list[list[int]]) -> list[object]:
    """All prompts at once in two chunks of different lengths: what they draw, and the scores of the first."""
    width = NUM_BLOCKS // len(prompts)
    tables = [list(range(index * width, (index + 1) * width)) for index in range(len(prompts))]
    cuts = [9 + 7 * index for index in range(len(prompts))]
    runner.launch([Row(prompt[:cut], 0, table, None) for prompt, cut, table in zip(prompts, cuts, tables, strict=True)])
    rows = [
        Row(prompt[cut:], cut, table, Draw(spec, prompt, len(prompt), 0))
        for prompt, cut, table, spec in zip(prompts, cuts, tables, SPECS, strict=True)
    ]
    rows[0] = rows[0]._replace(targets=PromptTargets(0, prompts[0][cuts[0] + 1 :], 2))
    launched = runner.launch(rows)
    return [
        [drawn.token_ids for drawn in launched.read() if drawn],
        [each.rank for each in launched.prompt_logprobs[0]],
    ]


def check_pipeline(folder: Path, count: int, ranks: int = 1, **options: object) -> None:
    alone, pipeline = ModelRunner.load(folder, **options), Pipeline(folder, count, ranks, **options)
    pool = torch.zeros(alone.kv_shape(NUM_BLOCKS, BLOCK_TOKENS))
    alone.bind_pool(pool)
    pipeline.bind_pools()
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(2, alone.config.vocab_size, (len(SPECS), 41), generator=generator).tolist()
    assert serve(pipeline, prompts) == serve(alone, prompts)
    close = {"rtol": 0.0, "atol": 0.0} if ranks == 1 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(torch.cat(pipeline.pools, 2), pool, **close)


@pytest.mark.parametrize(
    ("family", "fields", "count"),
    [
        ("llama", {"num_key_value_heads": 2}, 3),
        ("gemma2", {"sliding_window": 19}, 2),
        ("gemma3", {"sliding_window": 19, "tie_word_embeddings": True}, 2),
        (
            "qwen2_moe",
            {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
            2,
        ),
        ("deepseek_v3", LATENT | {"num_key_value_heads": 8}, 2),
    ],
)
def test_stages_compute_what_one_process_computes(make_model, family, fields, count):
    """Guards against layers of another stage, windows and kinds of layers counted from the stage's first, norms between
    stages, and an embedding or a head that a stage lacks. Bit for bit: the order of operations is the same."""
    check_pipeline(make_model(family, **SHAPE, **fields).folder, count)


def test_stages_are_groups_of_ranks(make_model):
    """Guards against ranks that enter a stage with nothing, or that join as if they were of the last stage."""
    check_pipeline(make_model("llama", **SHAPE, num_key_value_heads=2).folder, 2, ranks=2)


def test_random_weights_of_stages_are_those_of_one_process(make_model):
    """Guards against random weights that depend on what else a process has."""
    check_pipeline(make_model("llama", **SHAPE).folder, 2, load_format="dummy")


def test_a_stage_holds_its_layers_only(make_model, caplog):
    """Guards against stages that load the whole model, or warn of what other stages have."""
    folder = make_model("llama", **SHAPE).folder
    config = ModelConfig.from_folder(folder)
    first, middle, last = (
        load_weights(config, folder, torch.float32, pack=False, stage=Stage(index, 3)) for index in range(3)
    )
    assert [len(each.layers) for each in (first, middle, last)] == [1, 1, 1]
    sizes = [len(each.embedding) + len(each.lm_head.weight) for each in (first, middle, last)]
    assert sizes == [config.vocab_size, 0, config.vocab_size]
    assert "tensors_unused" not in caplog.text


def test_stages_share_layers_as_the_plan_of_kv_does():
    """Guards against a plan and weights that disagree on which stage has which layer."""
    for layers in range(1, 20):
        for count in range(1, min(layers, MAX_STAGES) + 1):
            assert Cut.even(1, 1, layers, count).layers == tuple(
                Stage(index, count).layers(layers) for index in range(count)
            )


def test_what_cannot_be_cut_is_refused(make_model):
    config = ModelConfig.from_folder(make_model("llama").folder)
    with pytest.raises(SettingsError, match="3 layers cannot be shared out to 4 stages"):
        check_stages(config, 4)
    with pytest.raises(SettingsError, match="--pp 9: must be from 1 to 8"):
        check_stages(config, 9)
