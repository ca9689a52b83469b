"""Experts of gpt-oss in MXFP4: dequantised at load to the numbers that transformers makes of them."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.weights import load_weights
from baton.node.errors import SettingsError
from baton.tests.unit.models.conftest import edit_config

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 2}


def quantise(made) -> None:
    """Random codes in the place of the folder's experts, and what they mean in the reference."""
    file = made.folder / "model.safetensors"
    tensors, chance = safetensors.torch.load_file(file), torch.Generator().manual_seed(4)
    for index, layer in enumerate(made.reference.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            parameter, stored = getattr(layer.mlp.experts, name), f"model.layers.{index}.mlp.experts.{name}"
            experts, inputs, outputs = tensors.pop(stored).shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=chance)
            scales = torch.randint(122, 126, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=chance)
            parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            tensors |= {f"{stored}_blocks": blocks, f"{stored}_scales": scales}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    edit_config(made.folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


@pytest.fixture
def made(make_model):
    made = make_model("gpt_oss", **SIZES)
    quantise(made)
    return made


def test_tokens_are_those_of_the_dequantised_model(made, sequences, prompt, caplog):
    """Guards the halves of bytes, the blocks' scales, and gate and up that take turns."""
    caplog.set_level("INFO")
    ours, logits = sequences(ModelRunner.load(made.folder), 1, 240).greedy(0, prompt, 100)
    with torch.inference_mode():
        theirs = made.reference(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    assert theirs.argmax(-1).tolist() == ours
    assert float((logits - theirs).abs().max() / theirs.abs().max()) <= 1e-4
    assert len(set(ours)) > 20, "a model that repeats itself shows nothing"
    assert "weights_quantised" in caplog.text and "tensors_unused" not in caplog.text


@pytest.mark.parametrize("role", ["blocks", "scales"])
def test_what_does_not_fit_is_named(made, role):
    """Guards against experts of another model, read as far as they go; and a scale that is no number."""
    file, name = made.folder / "model.safetensors", f"model.layers.1.mlp.experts.down_proj_{role}"
    tensors = safetensors.torch.load_file(file)
    tensors[name] = tensors[name][:, :-1].contiguous() if role == "blocks" else torch.full_like(tensors[name], 255)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SettingsError, match=f"_{role}"):
        load_weights(ModelConfig.from_folder(made.folder), made.folder, torch.float32)
