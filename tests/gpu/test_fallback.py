"""Models through transformers on a GPU: the CPU's tokens, steps in graphs where that can be, or a refusal by name."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")
pytest.importorskip("transformers", reason="the library that runs these models is optional")

from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.fallback.config import model_config
from baton.models.fallback.device import DeviceFallback
from baton.models.fallback.device_loader import load_on_device
from baton.node.errors import SettingsError
from baton.tests.unit.models.cuda.ahead import Ahead, one_after_the_other
from baton.tests.unit.models.fallback.families import EXPERTS, LATENT, SMALL_MAMBA, make_folder

pytestmark = pytest.mark.gpu

LONGEST, BLOCK, ROWS = 200, 64, 8
WIDE = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = {
    "gpt2": {"n_embd": 512, "n_head": 8},
    "olmo2": WIDE,
    "starcoder2": WIDE | {"sliding_window": 40},
    "flex_olmo": WIDE | EXPERTS,
    "glm4_moe_lite": LATENT,
    "gpt_bigcode": {},
}
"""Learned positions; norms of whole rows; a window; experts; padded heads with narrower values; one key head."""
CAPTURED = set(FAMILIES) - {"glm4_moe_lite", "flex_olmo"}
"""In float32 torch's product of experts asks the GPU for their rows."""


def load(folder, dtype) -> tuple[CudaRunner, DeviceFallback]:
    queue = CudaQueue(0)
    config, model = load_on_device(model_config(folder), folder, dtype, "auto", queue, 256, ROWS)
    runner = CudaRunner(config, model, queue, StepLimits(ROWS, 256, mixed_tokens=32), LONGEST)
    shape = (4 * ROWS, config.num_kv_heads, config.num_layers, 2, BLOCK, config.head_dim)
    runner.bind_pool(torch.zeros(shape, dtype=dtype, device="cuda:0"), LONGEST)
    return runner, model


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_cpu_s(tmp_path, family):
    """Guards the pool behind the library's models: chunks, steps of chunks and rows, captured steps that run ahead."""
    make_folder(tmp_path, family, **FAMILIES[family])
    runner, model = load(tmp_path, torch.float32)
    assert model.captured or family not in CAPTURED
    plain = ModelRunner.load(tmp_path)
    plain.bind_pool(torch.zeros(plain.kv_shape(14, 16)))
    prompts = [[(7 * i * i + 3 * slot) % 131 for i in range(9 + 22 * slot)] for slot in range(5)]
    tables = [list(range(1 + 4 * slot, 5 + 4 * slot)) for slot in range(5)]
    run, done = Ahead(runner), []
    for slot, prompt in enumerate(prompts):
        run.start(slot, prompt, tables[slot])
        while run.computed[slot] < len(prompt):
            run.launch([slot, *done[-3:]], 50)
        done.append(slot)
    for _ in range(20):
        run.launch(done)
    for slot, prompt in enumerate(prompts):
        found = run.generated(slot)[:20]
        assert found == one_after_the_other(plain, prompt, list(range(1, 13)), 20), slot


@pytest.mark.parametrize("family", ["olmo2", "flex_olmo"])
def test_the_trial_admits_models_in_bfloat16(tmp_path, family):
    """Guards a tolerance below what rounding does; the captured steps then run."""
    make_folder(tmp_path, family, **FAMILIES[family])
    runner, _ = load(tmp_path, torch.bfloat16)
    run = Ahead(runner)
    run.start(0, list(range(30)), [1, 2, 3])
    for _ in range(9):
        run.launch([0])
    assert len(run.generated(0)) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_outside_of_attention_is_refused(tmp_path, dtype):
    """Guards against wrong answers without an error, and a tolerance that is too wide."""
    make_folder(tmp_path, "falcon_h1", **SMALL_MAMBA)
    with pytest.raises(SettingsError, match="in chunks gives other logits"):
        load(tmp_path, dtype)
