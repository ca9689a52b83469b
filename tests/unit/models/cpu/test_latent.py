"""KV of latent attention: moved to another worker's pool or found as a prefix, it gives the tokens of one worker."""

import random

import pytest

from baton.kvtransfer.blocks.pool import BlockPool
from baton.models.batch import Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.node.errors import SettingsError
from baton.tests.unit.models.conftest import GREEDY, LATENT
from baton.worker.kv_layout import layout_of


def test_a_token_takes_one_row_of_one_unit(make_model):
    """Guards against a pool with room for keys and values, which would take twice the memory and the bytes moved."""
    runner = ModelRunner.load(make_model("deepseek_v3", **LATENT).folder)
    layout = layout_of(runner.config, runner.kv_format, 16)
    assert runner.kv_shape(5, 16) == layout.shape(5) == (5, 1, 3, 1, 16, 48)
    assert layout.block_bytes == 3 * 16 * 48 * 4
    assert layout.fingerprint_fields() != layout_of(runner.config, runner.kv_format, 32).fingerprint_fields()


def decode(runner: ModelRunner, blocks: list[int], known: list[int], count: int) -> list[int]:
    """`count` more tokens behind those known, of which the last is not computed."""
    tokens = list(known)
    for _ in range(count):
        (drawn,) = runner.step([Row((tokens[-1],), len(tokens) - 1, blocks, GREEDY)])
        assert drawn is not None
        tokens.append(drawn.token_ids[0])
    return tokens[len(known) :]


def test_blocks_that_were_moved_decode_as_in_one_worker(make_model, sequences, prompt):
    """Guards disaggregation: whole units to other places of another pool, checked by their digests, and no more."""
    made = make_model("deepseek_v2", **LATENT)
    expected, _ = sequences(ModelRunner.load(made.folder), 1, 240).greedy(0, prompt, 60)
    ends = []
    for _ in range(2):
        runner = ModelRunner.load(made.folder)
        pool = BlockPool(layout_of(runner.config, runner.kv_format, 16), 20)
        runner.bind_pool(pool.tensor, pool.scales)
        ends.append((runner, pool))
    (prefill, source), (decoder, target) = ends
    there, here = [4, 2, 7], list(range(19, -1, -1))
    (first,) = prefill.step([Row(prompt, 0, there, GREEDY)])
    assert first is not None
    for from_block, to_block in zip(there, here, strict=False):
        target.write(to_block, source.block(from_block))
    assert target.digest(here[:3]) == source.digest(there)
    tokens = [first.token_ids[0], *decode(decoder, here, [*prompt, first.token_ids[0]], 59)]
    assert tokens == expected
    for pool in (source, target):
        pool.close()


def test_sequences_in_chunks_together_equal_each_alone(make_model, sequences):
    """Guards against rows that leak into each other, and a chunk that does not see its prefix."""
    runner = ModelRunner.load(make_model("deepseek_v3", **LATENT).folder)
    chance = random.Random(2)
    prompts = [[chance.randrange(131) for _ in range(length)] for length in (70, 1, 33, 16)]
    alone = [sequences(runner, 1, 96).greedy(0, prompt, 10)[0] for prompt in prompts]
    together = sequences(runner, len(prompts), 96)
    known, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
    while short := [i for i, prompt in enumerate(prompts) if len(known[i]) < len(prompt) + 10]:
        rows = []
        for i in short:
            end = min(computed[i] + chance.choice((1, 5, 40)), len(known[i]))
            draw = GREEDY if end == len(known[i]) else None
            rows.append(Row(known[i][computed[i] : end], computed[i], together.tables[i], draw))
            computed[i] = end
        for i, drawn in zip(short, runner.step(rows), strict=True):
            known[i] += () if drawn is None else drawn.token_ids
    assert [tokens[len(prompt) :] for tokens, prompt in zip(known, prompts, strict=True)] == alone


def test_a_cached_prefix_gives_the_same_tokens(make_model, sequences, prompt):
    """Guards against latents that hold anything of the sequence that computed them but its tokens and places."""
    runner = ModelRunner.load(make_model("deepseek_v3", **LATENT).folder)
    shared, alone = sequences(runner, 2, 96), [*prompt[:32], 5, 9, 77]
    shared.greedy(0, prompt, 3)
    blocks = [*shared.tables[0][:2], *shared.tables[1]]
    (drawn,) = runner.step([Row(alone[32:], 32, blocks, GREEDY)])
    assert drawn is not None
    found = [drawn.token_ids[0], *decode(runner, blocks, [*alone, drawn.token_ids[0]], 19)]
    assert found == sequences(runner, 1, 96).greedy(0, alone, 20)[0]


def test_latents_are_not_quantised(make_model):
    """Guards against 8-bit latents by a scale for the whole row, which would leave the rotated key a few steps."""
    folder = make_model("deepseek_v2", **LATENT).folder
    with pytest.raises(SettingsError, match="--kv-dtype fp8: not supported for DeepseekV2ForCausalLM"):
        ModelRunner.load(folder, kv_dtype="fp8")


def test_config_of_published_models(tmp_path):
    """Guards the defaults and the scale of scores: those of DeepSeek-V2-Lite, whose queries have no latent, and V3."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    common = {"vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "intermediate_size": 10944}
    common |= {"max_position_embeddings": 163840, "num_attention_heads": 16, "num_experts_per_tok": 6}
    read = []
    for family, extra, mscale in (("deepseek_v2", {"q_lora_rank": None}, 0.707), ("deepseek_v3", {}, 1.0)):
        scaling = yarn | {"mscale": mscale, "mscale_all_dim": mscale}
        config = common | extra | {"model_type": family, "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(str(config).replace("'", '"').replace("None", "null"))
        read.append(ModelConfig.from_folder(tmp_path))
    lite, third = read
    assert lite.latent is not None and third.latent is not None
    assert (lite.latent.query_rank, third.latent.query_rank) == (None, 1536)
    assert (lite.num_kv_heads, lite.head_dim, lite.kv_planes, lite.rope.rotary_dim) == (1, 576, 1, 64)
    assert lite.score_scale == pytest.approx(192**-0.5 * 1.5896, rel=1e-4)
    assert third.score_scale == pytest.approx(192**-0.5 * 1.8738, rel=1e-4)
    assert lite.rope.attention_factor == 1.0 and lite.max_model_len == 163840
    assert lite.latent.query_dim == 192
