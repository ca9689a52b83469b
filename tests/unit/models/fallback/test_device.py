"""A transformers model behind a GPU's runner, on CPU tensors: kernels are interpreted, and run as late as can be."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("triton", reason="Triton is made for Linux only")

import baton.tests.unit.models.cuda.conftest  # noqa: F401 - mends the interpreter where there is no GPU
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.runner import CudaRunner
from baton.models.fallback.config import model_config
from baton.models.fallback.device_loader import load_on_device
from baton.models.fallback.modules import replace_modules
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.cuda.ahead import Ahead, one_after_the_other
from baton.tests.unit.models.fallback.families import LATENT, SHAPE, make_folder, weekly

BLOCK = 16


class FirstCaptureFails(LateQueue):
    """As where the library's code waits for the GPU."""

    failed = False

    def capture(self, work):
        if not self.failed:
            self.failed = True
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().capture(work)


@pytest.mark.parametrize(
    ("family", "config", "queue"),
    [
        pytest.param("gpt2", {}, LateQueue, id="captured"),
        pytest.param("glm4_moe_lite", LATENT, FirstCaptureFails, id="each launched, padded heads", marks=weekly),
    ],
)
def test_tokens_equal_the_cpu_s(tmp_path, family, config, queue):
    """Guards keys and values in the pool, positions, chunks, mixed steps and rows that run ahead of the host."""
    make_folder(tmp_path, family, num_hidden_layers=1, **config)
    plain, late_queue = ModelRunner.load(tmp_path), queue()
    plain.bind_pool(torch.zeros(plain.kv_shape(16, BLOCK)))
    config, model = load_on_device(
        model_config(tmp_path), tmp_path, torch.float32, "auto", late_queue, 24, 2, trial_tokens=5
    )
    assert model.captured == (queue is LateQueue)
    late = CudaRunner(config, model, late_queue, StepLimits(2, 24, mixed_tokens=8), 64)
    late.bind_pool(torch.zeros(16, config.num_kv_heads, 1, 2, BLOCK, config.head_dim), 64)
    prompts, tables = [[(7 * i * i + 3) % 131 for i in range(size)] for size in (5, 22)], [[1, 2], [5, 9, 4]]
    run = Ahead(late)
    run.start(0, prompts[0], tables[0])
    run.launch([0])
    run.start(1, prompts[1], tables[1])
    run.launch([0, 1], chunk=12)  # a row that decodes beside a chunk
    for _ in range(3):
        run.launch([0, 1])
    for slot, prompt in enumerate(prompts):
        found = run.generated(slot)
        assert found == one_after_the_other(plain, prompt, tables[slot], len(found)) and len(found) > 2


@pytest.mark.parametrize(("family", "replaced"), [("llama", 2 + 1), ("gemma", 2 + 1), ("gpt_neox", 0)])
def test_modules_that_kernels_compute_are_replaced(family, replaced):
    """Guards against a module replaced by its name, or by a kernel that computes something else: norms with a weight
    and with one more, MLPs with either activation; others stay."""
    config = AutoConfig.for_model(family, **SHAPE | {"num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        assert replace_modules(model, least_norm=64) == replaced + (family != "gpt_neox")
        torch.testing.assert_close(model(tokens, use_cache=False).logits, before, rtol=1e-4, atol=1e-5)


def test_a_norm_of_another_formula_stays():
    class MeanNorm(nn.Module):
        eps = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return nn.functional.layer_norm(x, (64,), self.weight)

    with torch.no_grad():
        assert replace_modules(nn.Sequential(MeanNorm()), least_norm=64) == 0
