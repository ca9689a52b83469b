"""EAGLE-3 drafts on a GPU: captured steps with them draw the tokens of steps without, and right ones are kept.

Run it in a separate process, as tests/gpu/test_runner.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.weights import load_weights
from baton.node.modelhub import locate_model
from baton.tests.gpu.test_runner import LONGEST, prompts, table
from baton.tests.unit.models.cuda.ahead import Ahead, always_draft
from baton.tests.unit.models.eagle_folders import random_draft, write_pair

pytestmark = pytest.mark.gpu

ROWS, COUNT, DRAFTS = 16, 100, 4


def make(folder: Path, draft: Path | None, dtype: torch.dtype) -> CudaRunner:
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, dtype, "cuda:0", pack=False)
    eagle = None
    if draft is not None:
        read = read_eagle(draft, config)
        eagle = (read, load_eagle(read, draft, weights, "auto", pack=False))
    most, deterministic = DRAFTS if draft is not None else 0, config.head_dim >= 64
    limits = StepLimits(ROWS, 2048, deterministic=deterministic, most_drafts=most)
    runner = CudaRunner(config, weights, CudaQueue(0), limits, LONGEST, eagle=eagle)
    layers = config.num_layers + (draft is not None)
    shape = (ROWS * 10 + 1, config.num_kv_heads, layers, 2, 64, config.head_dim)
    runner.bind_pool(torch.zeros(shape, dtype=dtype, device="cuda:0"), LONGEST)
    runner.warm_up()
    if draft is not None:
        always_draft(runner)
    return runner


def answers(runner: CudaRunner, made: list[list[int]], most: int) -> Ahead:
    """COUNT tokens after each prompt and more, every other row greedy; prompts are taken in beside what decodes."""
    run = Ahead(runner, most_drafts=most)
    for slot, prompt in enumerate(made):
        run.start(slot, prompt, table(slot), temperature=slot % 2 * 0.8, seed=slot + 1, max_tokens=COUNT)
        while run.computed[slot] < len(prompt):
            run.launch([*range(slot + 1)], chunk=(40, 200)[slot % 2])
    while live := [slot for slot in range(len(made)) if len(run.known[slot]) < len(made[slot]) + COUNT]:
        run.launch(live)
    return run


@pytest.mark.parametrize(("kind", "dtype"), [("random", torch.bfloat16), ("right", torch.float32)])
def test_tokens_with_and_without_a_draft_are_the_same(tmp_path, kind, dtype):
    """Guards the whole of it on a GPU: hidden states, entries and chains inside captured steps, beside prompts."""
    if kind == "right":
        folder, draft, made = tmp_path / "model", tmp_path / "draft", prompts(ROWS, 60)
        made = [[token % 60 for token in prompt] for prompt in made]
        write_pair(folder, draft)
    else:
        folder, draft, made = locate_model("demo"), tmp_path / "draft", prompts(ROWS)
        random_draft(draft, ModelConfig.from_folder(folder))
    off = answers(make(folder, None, dtype), made, 0)
    expected = [off.generated(slot)[:COUNT] for slot in range(ROWS)]
    on = answers(make(folder, draft, dtype), made, DRAFTS)
    assert [on.generated(slot) for slot in range(ROWS)] == expected
    assert on.num_verified > COUNT
    if kind == "right":
        assert on.num_accepted > 0.9 * on.num_verified and on.num_steps < off.num_steps - COUNT // 3
    print({"kind": kind, "dtype": str(dtype), "steps": on.num_steps, "off_steps": off.num_steps,
           "verified": on.num_verified, "accepted": on.num_accepted})  # fmt: skip
