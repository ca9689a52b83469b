"""EAGLE-3 drafts on the GPU's runner, its kernels interpreted and run as late as can be: the CPU's tokens and KV."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import fastest
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.cuda.ahead import GRAMMAR, Ahead, one_after_the_other
from baton.tests.unit.models.cuda.merged import merged_runner, random_adapter, with_vocabulary
from baton.tests.unit.models.eagle_folders import random_draft, write_pair

BLOCK = 16
SEEDED = {"temperature": 1.1, "seed": 6}


def make(model, draft, most_drafts: int, max_rows: int = 2, **limits) -> tuple[CudaRunner, torch.Tensor]:
    """A runner as it would be on a GPU, over an empty pool of 24 blocks; the pool."""
    config = ModelConfig.from_folder(model)
    weights = load_weights(config, model, torch.float32, pack=False)
    eagle = read_eagle(draft, config)
    step_limits = StepLimits(max_rows, 64, most_drafts=most_drafts, **limits)
    given = (eagle, load_eagle(eagle, draft, weights, "auto", pack=False))
    late = CudaRunner(config, weights, LateQueue(), step_limits, 128, fastest, eagle=given)  # sizes of no fixed tiles
    layers = config.num_layers + 1
    pool = torch.zeros(24, config.num_kv_heads, layers, 2, BLOCK, config.head_dim)
    late.bind_pool(pool, 96)
    return late, pool


def test_a_draft_that_equals_its_model_is_always_right(tmp_path):
    """Guards against entries of another token or place, hidden states that the next step has overwritten, drafts of
    another row, and blocks that end before the drafts do: alone, beside parts of a prompt, and beside masks; with
    attention that does not depend on the batch."""
    write_pair(tmp_path / "model", tmp_path / "draft", num_layers=2)
    late, _ = make(tmp_path / "model", tmp_path / "draft", 2, mixed_tokens=8, deterministic=True)
    plain = ModelRunner.load(tmp_path / "model")
    plain.bind_pool(torch.zeros(plain.kv_shape(24, BLOCK)))
    ahead, count, prompts = Ahead(late, most_drafts=2), 8, [[9, 8, 7, 6, 5, 4], [*range(1, 10)]]
    right = [one_after_the_other(plain, prompts[0], [20, 21], count, **SEEDED)]
    right.append(one_after_the_other(plain, prompts[1], [20, 21], 3))
    ahead.start(0, prompts[0], [1, 0], max_tokens=count, **SEEDED)
    for _ in range(3):
        ahead.launch([0])
    ahead.start(1, prompts[1], [4, 3])
    while len(ahead.known[1]) < len(prompts[1]) + 3:
        ahead.launch([0, 1])
    assert ahead.generated(0) == right[0]
    assert ahead.generated(1)[:3] == right[1]
    assert ahead.num_accepted == ahead.num_verified >= 4

    other = [token % 60 for token in range(30, 50)]
    masked = one_after_the_other(plain, other, [20, 21, 22], 2, grammar=GRAMMAR)
    ahead.start(0, prompts[0], [6, 7], max_tokens=count, **SEEDED)
    ahead.launch([0])
    ahead.start(1, other, [8, 9, 10], grammar=GRAMMAR)
    for _ in range(3):
        ahead.launch([0, 1], chunk=16)
    ahead.launch([0])
    assert ahead.generated(0) == right[0][: len(ahead.generated(0))]
    assert ahead.generated(1)[:2] == masked


def test_a_draft_s_kv_is_the_cpu_s(tmp_path, make_model):
    """Guards against entries that are left out of a prompt's part, of the last token before a draw, or of a step's
    tokens: what a worker sends is what the other, on any device, would have computed."""
    folder = make_model("llama", num_hidden_layers=2).folder
    config = ModelConfig.from_folder(folder)
    taps = {"eagle_aux_hidden_state_layer_ids": [0, 1]}
    random_draft(tmp_path / "draft", config, norm_before_residual=True, **taps)
    late, pool = make(folder, tmp_path / "draft", 0, max_rows=1)
    plain = ModelRunner.load(folder, eagle=tmp_path / "draft")
    expected = torch.zeros_like(pool)
    plain.bind_pool(expected)
    prompt, blocks = list(range(5, 42)), [5, 2, 9]
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), prompt, 37, 0)
    for rows in (
        [Row(prompt[:22], 0, blocks, None, following=prompt[22])],
        [Row(prompt[22:], 22, blocks, draw)],
    ):
        (*_, drawn) = late.launch(rows).read()
        assert plain.step(rows)[-1] == (drawn if drawn is None else drawn._replace(num_drafts=0))
    torch.testing.assert_close(pool[blocks], expected[blocks], rtol=2e-4, atol=2e-4)
    assert pool[blocks][:, :, 2].any()


def test_a_draft_beside_adapters(tmp_path):
    """Guards against an adapter that reaches the draft, and hidden states of another row: tokens of two rows of one
    prompt, one of which has an adapter, are those of merged weights. The draft equals the model, so that drafts of
    the row without adapter are right, and some of the other are wrong."""
    folder = tmp_path / "model"
    write_pair(folder, tmp_path / "draft", num_layers=2, mlp_size=16)  # adapters are multiples of 16 wide
    late, _ = make(folder, tmp_path / "draft", 2, adapter_slots=1, max_rank=16, adapter_vocabulary=True)
    config, weights = late.config, load_weights(late.config, folder, torch.float32, pack=False)
    adapter = with_vocabulary(random_adapter(config, [4], 3), config)
    assert late.adapters.fill(0, late.adapters.prepare(adapter)).done
    prompt, count, adapters = [9, 8, 7, 6, 5, 4], 7, (None, adapter)
    merged = [merged_runner(config, weights, own, BLOCK) for own in adapters]
    right = [one_after_the_other(runner, prompt, [20, 21], count, **SEEDED) for runner in merged]
    ahead = Ahead(late, most_drafts=2)
    ahead.adapters = {1: 0}
    for slot in (0, 1):
        ahead.start(slot, prompt, [2 * slot, 2 * slot + 1], **SEEDED)
    while min(map(len, ahead.known.values())) < len(prompt) + count:
        ahead.launch([0, 1])
    assert [ahead.generated(slot)[:count] for slot in (0, 1)] == right
    assert right[0] != right[1] and 2 <= ahead.num_accepted < ahead.num_verified
