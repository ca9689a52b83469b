"""Quantised checkpoints on a GPU: dequantised there, at load or for a product, bit for bit as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.kernels import DenseLinear, GroupedLinear, ScaledLinear
from baton.kernels.triton.dequantise import dequantise_groups, dequantise_scaled
from baton.models.config import ModelConfig
from baton.models.quantization.recipe import RECIPES
from baton.models.quantization.rounding import quantise
from baton.models.weights import load_weights

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
    cpu, gpu = (
        quantise(recipe, *weight.shape, device, lambda part, device=device: weight[part.start : part.stop].to(device))
        for device in ("cpu", "cuda:0")
    )
    assert torch.equal(gpu.codes.view(torch.uint8).cpu(), cpu.codes.view(torch.uint8))
    assert torch.equal(gpu.scales.cpu(), cpu.scales)
    assert (cpu.zeros is None) == (gpu.zeros is None)
    if cpu.zeros is not None and gpu.zeros is not None:
        assert torch.equal(gpu.zeros.cpu(), cpu.zeros)
