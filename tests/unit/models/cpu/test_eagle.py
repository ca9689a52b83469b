"""EAGLE-3 drafts on the CPU: logits against a plain computation of whole sequences, and a draft that is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from baton.kernels import Linear
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.eagle import EagleDrafts
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.models.eagle_folders import MIDLAYER, SPECULATORS, random_draft, write_pair

GREEDY = SamplingSpec(max_tokens=400, temperature=0.0)
SEEDED = SamplingSpec(max_tokens=400, temperature=1.3, seed=5, top_k=30)
MOST, TAPS = 3, "eagle_aux_hidden_state_layer_ids"


class Recorder:
    """A head that keeps its logits."""

    def __init__(self, head: Linear) -> None:
        self._head = head
        self.logits: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.logits.append(self._head(x))
        return self.logits[-1]


def plain_logits(tensors, config, embedding, taps, tokens, num_drafts):
    """Of the drafts behind `tokens`: taps [len(tokens) - 1, T], the hidden states at all but the last. The layer runs
    over all entries anew for each, and the drafts are the best of the logits before."""
    layer = {name.removeprefix(MIDLAYER).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    eps, dim = config["rms_norm_eps"], config["head_dim"]

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    def turned(x):  # [heads, N, dim]
        angles = torch.arange(x.shape[1])[:, None] / config["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        cos, sin = torch.cat((angles, angles), 1).cos(), torch.cat((angles, angles), 1).sin()
        return x * cos + torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1) * sin

    hidden, known, found = taps @ layer["fc"].T, list(tokens), []
    for _ in range(num_drafts):
        embedded = norm(embedding[known[1:]], layer["input_layernorm"])
        normed = norm(hidden, layer["hidden_norm"])
        x = torch.cat((embedded, normed), -1)
        q, k, v = (
            (x @ layer[f"self_attn.{name}_proj"].T).view(len(x), -1, dim).transpose(0, 1) for name in ("q", "k", "v")
        )
        group = len(q) // len(k)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        attended = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        residual = normed if config.get("norm_before_residual") else hidden
        residual = residual + attended.transpose(0, 1).flatten(1) @ layer["self_attn.o_proj"].T
        y = norm(residual, layer["post_attention_layernorm"])
        residual = residual + (F.silu(y @ layer["mlp.gate_proj"].T) * (y @ layer["mlp.up_proj"].T)) @ (
            layer["mlp.down_proj"].T
        )
        logits = norm(residual[-1], layer["norm"]) @ layer["lm_head"].T
        found.append(logits)
        best = int(logits.argmax())
        known.append(best + int(tensors["d2t"][best]))
        hidden = torch.cat((hidden, residual[-1:]))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("prefix", "fields"),
    [
        (MIDLAYER, {}),
        (SPECULATORS, {"norm_before_residual": True, "hidden_size": 40}),
        (MIDLAYER, {"eagle_aux_hidden_state_layer_ids": [3, 0], "num_attention_heads": 8}),
    ],
)
def test_drafts_have_the_logits_of_a_plain_computation(tmp_path, make_model, prompt, prefix, fields):
    """Guards against hidden states of another layer or place, a token that is off by one, entries of rejected drafts or
    of a prompt's part that stay in the cache, and parts of the layer that are left out."""
    made = make_model("llama", num_hidden_layers=4, rms_norm_eps=1e-5)
    config = ModelConfig.from_folder(made.folder)
    tensors = random_draft(tmp_path / "draft", config, prefix, **fields)
    base = {"rms_norm_eps": 1e-5, "head_dim": config.head_dim, "rope_theta": 10000.0, **fields}
    runner = ModelRunner.load(made.folder, eagle=tmp_path / "draft", most_drafts=MOST)
    drafts = runner._eagle
    assert drafts is not None
    recorder = Recorder(drafts._weights.head)
    drafts._weights = replace(drafts._weights, head=recorder)
    runner.bind_pool(torch.zeros(runner.kv_shape(6, 16)))
    blocks, known = [4, 1, 3, 2], list(prompt[:20])
    runner.step([Row(known[:9], 0, blocks, None, following=known[9])])
    embedding = tensors.get("embed_tokens.weight", made.reference.model.embed_tokens.weight.detach())
    row = Row(known[9:], 9, blocks, Draw(GREEDY, known, 20, 0))
    for step in range(6):
        recorder.logits.clear()
        (drawn,) = runner.step([row])
        assert drawn is not None
        known += drawn.token_ids
        if step:
            states = made.reference(torch.tensor([known[:-1]]), output_hidden_states=True).hidden_states
            taps = torch.cat([states[tap][0].detach() for tap in fields.get(TAPS, (2, 2, 1))], -1)
            expected = plain_logits(tensors, base, embedding, taps, known, MOST)
            torch.testing.assert_close(torch.cat(recorder.logits), expected, atol=2e-4, rtol=1e-3)
        draw = Draw(GREEDY, known, 20, len(known) - 20)
        row = Row(known[-1:], len(known) - 1, blocks, draw, most_drafts=MOST if step > 1 else 0)
        if step > 2:
            assert drawn.num_drafts == MOST


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_a_draft_that_equals_its_model_is_always_right(tmp_path, sampling):
    """Guards against drafts that are proposed behind another token, drawn with the noise of another place, or lost
    where a row's blocks end."""
    write_pair(tmp_path / "model", tmp_path / "draft")
    runner = ModelRunner.load(tmp_path / "model", eagle=tmp_path / "draft", most_drafts=MOST)
    runner.bind_pool(torch.zeros(runner.kv_shape(9, 16)))
    prompts = [[5, 9, 30, 2, 44, 17], [8, 8, 1]]
    known = [list(prompt) for prompt in prompts]
    tables = [[1, 5, 2, 8], [7, 3, 4, 6]]
    starts, verified = [0, 0], 0
    for step in range(12):
        rows = []
        for slot, tokens in enumerate(known):
            draw = Draw(sampling, tokens, len(prompts[slot]), len(tokens) - len(prompts[slot]))
            most = MOST * (step > 0)
            rows.append(Row(tokens[starts[slot] :], starts[slot], tables[slot], draw, slot, most_drafts=most))
        for slot, drawn in enumerate(runner.step(rows)):
            assert drawn is not None and len(drawn.token_ids) == drawn.num_drafts + 1
            starts[slot] = len(known[slot]) + drawn.num_drafts
            known[slot] += drawn.token_ids
            verified += drawn.num_drafts
    assert verified == 2 * MOST * 10  # none behind a prompt, then all
    alone = ModelRunner.load(tmp_path / "model")
    alone.bind_pool(torch.zeros(alone.kv_shape(9, 16)))
    for prompt, tokens in zip(prompts, known, strict=True):
        again = list(prompt)
        while len(again) < len(tokens):
            draw = Draw(sampling, again, len(prompt), len(again) - len(prompt))
            (drawn,) = alone.step([Row(again, 0, tables[0], draw)])
            assert drawn is not None
            again += drawn.token_ids
        assert again == tokens


def test_a_draft_for_a_worker_that_only_computes_prompts_writes_the_same_kv(tmp_path, prompt):
    """Guards against KV of the draft's layer that depends on how a prompt was cut, or whether drafts are proposed."""
    write_pair(tmp_path / "model", tmp_path / "draft")
    prompt, pools = [token % 60 for token in prompt], []
    for most, size in ((MOST, 37), (0, 10)):
        runner = ModelRunner.load(tmp_path / "model", eagle=tmp_path / "draft", most_drafts=most)
        pools.append(torch.zeros(runner.kv_shape(4, 16)))
        runner.bind_pool(pools[-1])
        for start in range(0, 37, size):
            end = min(start + size, 37)
            draw, following = (Draw(GREEDY, prompt, 37, 0), None) if end == 37 else (None, prompt[end])
            runner.step([Row(prompt[start:end], start, [2, 1, 3], draw, following=following)])
    assert pools[0][:, :, 4].any()
    torch.testing.assert_close(*pools)


def test_drafts_of_a_prompt_that_another_worker_computed_are_right_from_the_second_step_on(tmp_path, prompt):
    """Guards against entries of the prompt's last token that are lost on the way, where only blocks and the first token
    are sent: the first step has no hidden state behind the prompt yet."""
    write_pair(tmp_path / "model", tmp_path / "draft")
    known, blocks = [token % 60 for token in prompt], [2, 1, 3]
    workers = [ModelRunner.load(tmp_path / "model", eagle=tmp_path / "draft", most_drafts=most) for most in (0, MOST)]
    pools = [torch.zeros(worker.kv_shape(5, 16)) for worker in workers]
    for worker, pool in zip(workers, pools, strict=True):
        worker.bind_pool(pool)
    found = []
    for step in range(4):
        start = 0 if step == 0 else len(known) - 1
        draw = Draw(SEEDED, known, 37, len(known) - 37)
        (drawn,) = workers[min(step, 1)].step([Row(known[start:], start, blocks, draw, most_drafts=MOST * (step > 0))])
        assert drawn is not None
        known += drawn.token_ids
        found.append((drawn.num_drafts, len(drawn.token_ids)))
        if step == 0:
            pools[1].copy_(pools[0])
    assert found == [(0, 1), (0, 1), (MOST, MOST + 1), (MOST, MOST + 1)]


def test_random_weights_make_a_draft(tmp_path, make_model):
    """Guards against --load-format dummy that reads weights of the draft."""
    made = make_model("llama")
    config = ModelConfig.from_folder(made.folder)
    random_draft(tmp_path / "draft", config)
    (tmp_path / "draft" / "model.safetensors").unlink()
    runner = ModelRunner.load(made.folder, load_format="dummy", eagle=tmp_path / "draft", most_drafts=2)
    assert isinstance(runner._eagle, EagleDrafts)
    assert runner.kv_shape(1, 16)[2] == config.num_layers + 1
