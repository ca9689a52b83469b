"""Latent attention by the GPU's runner, on CPU tensors with its kernels interpreted: against the CPU's runner."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.decode_plan import split_plan
from baton.models.batch import Draw, Row
from baton.models.cuda import latent
from baton.models.cuda.products import fastest
from baton.node.errors import SettingsError
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.models.conftest import LATENT
from baton.tests.unit.models.cuda.ahead import Ahead, check_drafts, one_after_the_other
from baton.tests.unit.models.cuda.test_runner import PROMPTS, TABLES, make

DENSE = LATENT | {"v_head_dim": 16, "first_k_dense_replace": 2, "num_hidden_layers": 2}


def test_logits_equal_the_cpu_s(make_model, monkeypatch):
    """Guards queries with a latent, a chunk that follows a cached prefix, and a context of more than one slice."""
    monkeypatch.setattr(latent, "EXPANDED_BYTES", 64 * 4 * 32 * 4)
    late, plain = make(make_model("deepseek_v3", **DENSE | {"num_hidden_layers": 1}).folder, policy=fastest)
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
    first = [Row(list(range(3, 63)), 0, [5, 2, 9, 11, 4], None), Row([7], 0, [1], draw)]
    then = [Row(list(range(40, 48)), 60, [5, 2, 9, 11, 4], draw)]
    for rows in (first, then):
        torch.testing.assert_close(late.logits(rows), plain.compute(rows)[1], rtol=2e-4, atol=2e-4)


def test_steps_ahead_of_the_host_give_the_cpu_s_tokens(make_model):
    """Guards queries without a latent, rows that pad a captured step, and prompts beside rows that decode."""
    config = DENSE | {"q_lora_rank": None, "num_hidden_layers": 1, "vocab_size": 144}
    late, plain = make(make_model("deepseek_v2", **config).folder, mixed_tokens=1)
    run = Ahead(late)
    run.start(0, PROMPTS[0], TABLES[0])
    run.start(1, PROMPTS[1], TABLES[1])
    for slots in ([0], [0, 1], [1, 0], [0, 1]):
        run.launch(slots, chunk=9)
    for slot in (0, 1):
        found = run.generated(slot)
        assert found == one_after_the_other(plain, PROMPTS[slot], TABLES[slot], len(found))


def test_drafts_are_verified(make_model):
    """Guards latents of rejected drafts, and queries of one sequence that read together."""
    folder = make_model("deepseek_v2", **DENSE | {"num_hidden_layers": 1, "vocab_size": 144}).folder
    late, plain = make(folder, max_rows=1, most_drafts=3)
    check_drafts(late, plain, PROMPTS[0], TABLES[0], 8)


def test_few_rows_are_not_cut_into_more_parts_than_are_merged_quickly():
    """Guards against a row of 132 parts, whose merge took longer than its attention; many rows are shared as ever."""
    assert latent.plan_latent_rows(1, 16, 8192, 132, False).splits == latent.MOST_PARTS
    assert latent.plan_latent_rows(64, 16, 8192, 132, False) == split_plan(64, 1, 132)
    assert latent.plan_latent_rows(8, 128, 8192, 132, False).splits == 8


def test_sizes_without_kernels_are_refused_by_name(make_model):
    """Guards against a worker that fails at its first request."""
    with pytest.raises(SettingsError, match="v_head_dim 12"):
        make(make_model("deepseek_v2", **DENSE | {"v_head_dim": 12}).folder)
