"""The step: however a sequence is cut into rows and whatever runs beside it, the tokens are the same."""

import random

import pytest
import torch

from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.messages.control import SamplingSpec

GREEDY = SamplingSpec(max_tokens=1000, temperature=0.0)
WINDOWED = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(
    ("family", "variant"),
    [("qwen2", {}), ("qwen2", WINDOWED), ("gemma3", {"sliding_window": 19})],
    ids=["full", "windowed", "two ropes"],
)
def test_chunked_prefill_equals_one_shot(make_model, sequences, chunk, block_tokens, family, variant):
    """Guards against a chunk that does not see the prefix, sees the future, or lands in the wrong slots."""
    runner = ModelRunner.load(make_model(family, **variant).folder)
    prompt = torch.randint(0, 131, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    whole, expected = sequences(runner, 1, 200, 16).greedy(0, prompt, 20)
    cut, logits = sequences(runner, 1, 200, block_tokens).greedy(0, prompt, 20, chunk)
    assert cut == whole
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_long_chunk_after_a_prefix_equals_one_shot(make_model, sequences):
    """Guards against the slices of queries, which only chunks of more than 256 tokens after a prefix have."""
    runner = ModelRunner.load(make_model("mistral", sliding_window=150, max_position_embeddings=1024).folder)
    prompt = torch.randint(0, 131, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    _, expected = sequences(runner, 1, 704).greedy(0, prompt, 1, chunk=90)
    _, logits = sequences(runner, 1, 704).greedy(0, prompt, 1, chunk=620)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "variant"),
    [("qwen3", WINDOWED), ("phi3", {"pad_token_id": 0, "sliding_window": 19}), ("gemma2", {"sliding_window": 19})],
)
def test_row_alone_equals_row_among_32(make_model, sequences, family, variant):
    """Guards against rows that leak into each other: 32 sequences, chunks and single tokens mixed in each step."""
    runner = ModelRunner.load(make_model(family, **variant).folder)
    chance = random.Random(2)
    prompts = [[chance.randrange(131) for _ in range(chance.randrange(1, 120))] for _ in range(32)]
    alone = [sequences(runner, 1, 160).greedy(0, prompt, 12)[0] for prompt in prompts]

    together = sequences(runner, 32, 160)
    known, computed = [list(prompt) for prompt in prompts], [0] * 32
    while any(len(known[i]) < len(prompts[i]) + 12 for i in range(32)):
        busy = [i for i in range(32) if len(known[i]) < len(prompts[i]) + 12 and chance.random() < 0.8]
        rows = []
        for i in busy:
            end = min(computed[i] + chance.choice((1, 5, 40)), len(known[i]))
            draw = Draw(GREEDY, (), 0, 0) if end == len(known[i]) else None
            rows.append(Row(known[i][computed[i] : end], computed[i], together.tables[i], draw))
            computed[i] = end
        for i, row, drawn in zip(busy, rows, runner.step(rows), strict=True):
            assert (drawn is None) == (row.draw is None)
            if drawn is not None:
                known[i].append(drawn.token_ids[0])
    assert [tokens[len(prompt) :] for tokens, prompt in zip(known, prompts, strict=True)] == alone


def test_step_writes_only_the_slots_of_its_rows(make_model, sequences):
    """Guards against a write into another sequence's block, or behind the last token of the own one."""
    runner = ModelRunner.load(make_model("llama").folder)
    pool = torch.zeros(runner.kv_shape(6, 16))
    runner.bind_pool(pool)
    pool.fill_(7.0)
    runner.step([Row([1, 2, 3], 14, [4, 2], None), Row([9], 3, [5], None)])
    touched = {(int(block), int(slot)) for block, slot in (pool != 7.0).any(dim=(1, 2, 3, 5)).nonzero()}
    assert touched == {(4, 14), (4, 15), (2, 0), (5, 3)}
    written = (pool != 7.0)[[4, 4, 2, 5], :, :, :, [14, 15, 0, 3]]
    assert bool(written.all()), "keys and values of every layer and head"


def test_blocks_beyond_the_tokens_may_be_any(make_model, sequences, prompt):
    """Guards against reading reserved blocks: rows may come with more blocks than they have tokens."""
    runner = ModelRunner.load(make_model("llama").folder)
    pool = torch.zeros(runner.kv_shape(8, 16))
    runner.bind_pool(pool)
    pool[6:] = float("nan")
    drawn = runner.step([Row(prompt, 0, [0, 1, 2, 6, 7], Draw(GREEDY, (), 0, 0))])[0]
    again = runner.step([Row(prompt[-1:], 36, [0, 1, 2, 7, 6], Draw(GREEDY, (), 0, 0)), Row([1], 90, [3] * 6, None)])[0]
    assert drawn is not None and again is not None and drawn.token_ids[0] == again.token_ids[0]


def test_no_rows_is_no_step(make_model):
    runner = ModelRunner.load(make_model("llama").folder)
    assert runner.step([]) == []


def test_seeded_draws_do_not_depend_on_the_batch(make_model, sequences):
    """Guards against a replay, or another batch, that draws other tokens from the same seed."""
    runner = ModelRunner.load(make_model("llama").folder)
    run = sequences(runner, 8, 64)
    prompts = [[i + 1, 2, 3] for i in range(8)]

    def rows(order: list[int]) -> list[Row]:
        params = SamplingSpec(max_tokens=9, temperature=1.3, top_p=0.95, seed=77)
        return [Row(prompts[i], 0, run.tables[i], Draw(params, (), 3, 0)) for i in order]

    together = runner.step(rows(list(range(8))))
    backwards = runner.step(rows(list(range(7, -1, -1))))
    assert together == backwards[::-1]
    assert together == [runner.step(rows([i]))[0] for i in range(8)]
    assert len({drawn.token_ids[0] for drawn in together if drawn is not None}) > 1


def test_dynamic_rope_stops_where_it_is_defined(make_model, sequences):
    """Guards against tokens that would depend on how a sequence was cut into steps, silently."""
    made = make_model(
        "llama",
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    assert ModelConfig.from_folder(made.folder).max_model_len == 32
    runner = ModelRunner.load(made.folder)
    run = sequences(runner, 1, 64)
    runner.step([Row(list(range(32)), 0, run.tables[0], None)])
    with pytest.raises(InvariantBroken, match="33 tokens"):
        runner.step([Row([1], 32, run.tables[0], None)])


def test_pool_of_another_shape_dtype_or_order_is_refused(make_model):
    """Guards against reading a pool as something that it is not."""
    runner = ModelRunner.load(make_model("llama").folder)
    shape = runner.kv_shape(4, 16)
    assert shape == (4, 2, 3, 2, 16, 16)
    for pool in (
        torch.zeros(shape[:-1]),
        torch.zeros(runner.kv_shape(4, 16)[:-1] + (8,)),
        torch.zeros(shape, dtype=torch.bfloat16),
        torch.zeros(shape)[:, :, :, :, ::2],
    ):
        with pytest.raises(InvariantBroken):
            runner.bind_pool(pool)
    with pytest.raises(InvariantBroken):
        runner.step([Row([1], 0, [0], None)])


def test_unknown_dtype_is_refused(make_model):
    """Guards against a worker that starts and then fails in its first step."""
    with pytest.raises(SettingsError, match="int4"):
        ModelRunner.load(make_model("llama").folder, dtype="int4")
