"""Checkpoints that llm-compressor and auto-round wrote (make_checkpoints.py): every weight is what they make of it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from baton.models.config import ModelConfig
from baton.models.weights import load_weights

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
METHODS = {
    "auto_awq_asym": ("awq", ("awq",), (4,)),
    "auto_gptq_asym": ("gptq", ("gptq",), (4,)),
    "auto_gptq_sym": ("gptq", ("gptq",), (4,)),
    "auto_round_3_bits": ("auto-round", ("gptq",), (3,)),
    "auto_round_8_bits": ("auto-round", ("gptq",), (8,)),
    "auto_round_asym": ("auto-round", ("awq",), (4,)),
    "auto_round_sym": ("auto-round", ("gptq",), (4,)),
    "fp8": ("compressed-tensors", ("packed", "scaled"), (8,)),
    "fp8_block": ("compressed-tensors", ("packed", "scaled"), (8,)),
    "fp8_dynamic": ("compressed-tensors", ("packed", "scaled"), (8,)),
    "w3a16": ("compressed-tensors", ("packed", "scaled"), (3,)),
    "w4a16": ("compressed-tensors", ("packed", "scaled"), (4,)),
    "w4a16_asym": ("compressed-tensors", ("packed", "scaled"), (4,)),
    "w8a8": ("compressed-tensors", ("packed", "scaled"), (8,)),
}


def weights_by_module(folder):
    """Of the only layer, in float32."""
    config = ModelConfig.from_folder(folder)
    (layer,) = load_weights(config, folder, torch.float32, pack=False).layers
    query, key, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, layer.shape.mlp.width
    attention = zip("qkv", layer.attention.qkv.weight.split((query, key, key)), strict=True)
    mlp = zip(("gate", "up"), layer.mlp.gate_up.weight.split((inner, inner)), strict=True)
    prefix = "model.layers.0."
    return {
        **{f"{prefix}self_attn.{name}_proj": weight for name, weight in attention},
        **{f"{prefix}mlp.{name}_proj": weight for name, weight in mlp},
        f"{prefix}self_attn.o_proj": layer.attention.o.weight,
        f"{prefix}mlp.down_proj": layer.mlp.down.weight,
    }


def digest(weight):
    """Without the sign of zeros, which auto-round's own products lose."""
    return hashlib.sha256((weight + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_those_of_the_library_that_wrote_them(name, caplog):
    """Guards every bit of a format against a misreading that own writers would share: offsets of zero points, order of
    nibbles, the dimension of packing, names and types of scales. Libraries round to the type of their scales."""
    folder = CHECKPOINTS / name
    quantization = ModelConfig.from_folder(folder).quantization
    assert quantization is not None
    assert (quantization.method, quantization.layouts, quantization.bits) == METHODS[name]
    expected = json.loads((folder / "expected.json").read_text())
    dtype = torch.float16 if name.startswith("auto") else torch.bfloat16
    with caplog.at_level("INFO"):
        found = weights_by_module(folder)
    assert {module: digest(weight.to(dtype)) for module, weight in found.items()} == expected
    assert "count=7 plain=4 products=dense:5 activations=float32" in caplog.text
    assert "tensors_unused" not in caplog.text, "static scales of inputs and shapes of weights are known"


def test_every_checkpoint_of_the_folder_is_tested():
    assert {path.name for path in CHECKPOINTS.iterdir()} == set(METHODS)
