"""Quantised checkpoints on a GPU: dequantised there, bit for bit as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.models.config import ModelConfig
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
