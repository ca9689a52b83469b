"""Adapters that PEFT itself makes of tiny models, with random numbers on both sides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers

SAVED_ANYWAY = "Setting `save_embedding_layers`|Model has `tie_word_embeddings"


@dataclass(frozen=True)
class MadeAdapter:
    folder: Path
    model: torch.nn.Module
    """Of PEFT, unmerged."""

    def merged(self) -> torch.nn.Module:
        return copy.deepcopy(self.model).merge_and_unload()


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., MadeAdapter]:
    """make_adapter(model, name, **options of LoraConfig) saves a random adapter of a copy of the model."""

    def make(
        model: transformers.PreTrainedModel, name: str = "adapter", seed: int = 1, **options: object
    ) -> MadeAdapter:
        torch.manual_seed(seed)
        config = peft.LoraConfig(init_lora_weights=False, **({"r": 4, "lora_alpha": 6} | options))
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        for parameter_name, parameter in adapted.named_parameters():
            if "magnitude" in parameter_name:
                parameter.data = parameter.data * (1 + torch.rand_like(parameter))
            elif any(part in parameter_name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.data = torch.randn_like(parameter) * 0.15
        folder = tmp_path / "adapters" / name
        adapted.save_pretrained(folder)
        return MadeAdapter(folder, adapted)

    return make
