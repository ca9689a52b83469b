"""Quantised checkpoints on a GPU: dequantised there, at load or for a product, bit for bit as on the CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from baton.benchmark.harness.shapes import SHAPES
from baton.kernels import DenseLinear, GroupedLinear, ScaledLinear
from baton.kernels.triton.dequantise import dequantise_groups, dequantise_scaled
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.quantization.recipe import RECIPES
from baton.models.quantization.rounding import quantise
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.testing.coded_inputs import RUNS, with_coded_inputs
from baton.tests.gpu.test_runner import LONGEST, exact_logits, table
from baton.tests.unit.models.cuda.ahead import Ahead

pytestmark = pytest.mark.gpu
CHECKPOINTS = Path(__file__).resolve().parents[1] / "unit" / "models" / "quantization" / "checkpoints"


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKPOINTS.iterdir()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    """Guards against an operation on bytes or FP8 that a GPU lacks or does otherwise, and fused products: the shift of
    bytes, the wrap of zero points, widening of FP8, a multiplication and a subtraction as one."""
    config = ModelConfig.from_folder(CHECKPOINTS / name)
    cpu, gpu = (load_weights(config, CHECKPOINTS / name, dtype, device, pack=False) for device in ("cpu", "cuda:0"))
    for ours, theirs in zip(gpu.layers[0].linears, cpu.layers[0].linears, strict=True):
        assert isinstance(ours, DenseLinear) and isinstance(theirs, DenseLinear)
        assert torch.equal(ours.weight.cpu(), theirs.weight)


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKPOINTS.iterdir()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_dequantised_to_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    """Guards the layouts of a GPU, and the kernels that make plain weights of them."""
    config = ModelConfig.from_folder(CHECKPOINTS / name)
    plain = load_weights(config, CHECKPOINTS / name, dtype, pack=False)
    kept = load_weights(config, CHECKPOINTS / name, dtype, "cuda:0", pack=False, keep_quantised=True)
    for ours, theirs in zip(kept.linears, plain.linears, strict=True):
        assert isinstance(theirs, DenseLinear)
        out = torch.full((ours.num_outputs, ours.num_inputs), float("nan"), dtype=dtype, device="cuda:0")
        match ours:
            case DenseLinear():
                out = ours.weight
            case ScaledLinear():
                dequantise_scaled(ours.codes, ours.scales, ours.outputs_per_scale, ours.inputs_per_scale, out)
            case GroupedLinear():
                dequantise_groups(ours.words, ours.scales, ours.zeros, ours.order, ours.block, out)
        assert torch.equal(out.cpu(), theirs.weight), ours.weight_format


@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_quantises_as_the_cpu_does(name: str) -> None:
    """Guards the identity of a recipe: workers that share KV quantise on either. A GPU divides otherwise by numbers
    than by tensors, and its type of FP8 rounds by itself."""
    recipe, weight = RECIPES[name], torch.randn(384, 896, generator=torch.Generator().manual_seed(0))
    weight[5], weight[6] = 0.0, weight[6] * 1e-4
    outputs, inputs = weight.shape
    cpu, gpu = (
        quantise(recipe, outputs, inputs, device, lambda part, device=device: weight[part.start : part.stop].to(device))
        for device in ("cpu", "cuda:0")
    )
    assert torch.equal(gpu.codes.view(torch.uint8).cpu(), cpu.codes.view(torch.uint8))
    assert torch.equal(gpu.scales.cpu(), cpu.scales)
    assert (cpu.zeros is None) == (gpu.zeros is None)
    if cpu.zeros is not None and gpu.zeros is not None:
        assert torch.equal(gpu.zeros.cpu(), cpu.zeros)


INPUTS = {"fp8": (torch.float8_e4m3fn, None), "fp8_block": (torch.float8_e4m3fn, RUNS), "int8": (torch.int8, None)}
"""Codes of inputs, where products take them so."""
TOLERANCE = {"fp8": 0.12, "fp8_block": 0.12, "int8": 0.06}
"""Of logits, else 0.02. An input of 16 bits that is rounded otherwise than the CPU's falls to the code beside; behind a
few products the two differ by as much as codes do from what they stand for. On this model and prompt the CPU itself
differs, with inputs in codes, in bfloat16 from float32 by 0.092, 0.088 and 0.046."""


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_steps_with_quantised_weights_match_the_cpu(tmp_path: Path, name: str, deterministic: bool) -> None:
    """Guards the kernels of each format where they are used, at the sizes of an 8B model: logits of a prompt, whole and
    in chunks, beside the CPU's with inputs as they are or in codes, and captured steps behind it, of one row and of
    many. Deterministic, all of them have the same bits."""
    fields = json.loads((SHAPES / "llama-3.1-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 2, "vocab_size": 4096}))
    config = ModelConfig.from_folder(tmp_path)
    weights = load_weights(
        config, tmp_path, torch.bfloat16, "cuda:0", "dummy", pack=False, recipe=RECIPES[name], keep_quantised=True
    )
    runner = CudaRunner(config, weights, CudaQueue(0), StepLimits(40, 2048, 1, deterministic), LONGEST)
    pool_shape = (400, config.num_kv_heads, 2, 2, 64, config.head_dim)
    runner.bind_pool(torch.zeros(pool_shape, dtype=torch.bfloat16, device="cuda:0"), LONGEST)
    prompt = [random.Random(3).randrange(4000) for _ in range(300)]
    draw = Draw(SamplingSpec(max_tokens=99, temperature=0.0), (), 300, 0)
    whole = runner.logits([Row(prompt, 0, table(0), draw)]).float().cpu()
    runner.logits([Row(prompt[:128], 0, table(1), draw)])
    parts = runner.logits([Row(prompt[128:], 128, table(1), draw)]).float().cpu()
    run = Ahead(runner)
    for slot in range(9):  # the same sequence in every row
        run.start(slot, prompt, table(slot))
    run.launch([0, 1, 2], chunk=1000)
    run.launch(list(range(3, 9)), chunk=1000)
    for _ in range(6):
        run.launch([0])
        run.launch(list(range(1, 9)))
    found = [run.generated(slot)[:6] for slot in range(9)]
    known = prompt + found[0]
    exact = [exact_logits(config, weights, known)]
    if name in INPUTS:
        exact.append(exact_logits(config, weights, known, lambda plain: with_coded_inputs(plain, *INPUTS[name])))
    for logits in (whole, parts):
        errors = [float((logits - each[299]).norm() / each[299].norm()) for each in exact]
        assert min(errors) < TOLERANCE.get(name, 0.02), errors
    for step in range(6):
        row = exact[0][299 + step]
        assert row.max() - row[known[300 + step]] < 0.25 * row.std(), step
    if deterministic:
        assert torch.equal(whole, parts)
        assert all(tokens == found[0] for tokens in found), found
