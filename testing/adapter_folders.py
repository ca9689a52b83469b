"""Writes folders of adapters as PEFT saves them, with random numbers, for tests and benchmarks that do without PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from baton.models.adapters.modules import ProductPlace, adapted_modules
from baton.models.config import ModelConfig
from baton.node.adapter_folder import CONFIG_NAME, WEIGHTS_NAME


def write_adapter(folder: Path, config: ModelConfig, *, rank: int = 8, seed: int = 0, spread: float = 0.2) -> Path:
    """An adapter of all modules in the layers of a model; `spread`: standard deviation of its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, place in adapted_modules(config).items():
        if isinstance(place, ProductPlace):
            name, shape = f"base_model.model.{module}.lora_", place.shape
            tensors[f"{name}A.weight"] = torch.randn(rank, shape.num_inputs, generator=generator) * spread
            tensors[f"{name}B.weight"] = torch.randn(shape.num_outputs, rank, generator=generator) * spread
    save_file(tensors, folder / WEIGHTS_NAME)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / CONFIG_NAME).write_text(json.dumps(fields))
    return folder
