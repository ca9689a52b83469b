"""What a worker derives from its model's folder before it joins: the longest sequence, and the namespace of its KV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from baton.models.config import ModelConfig
from baton.node.errors import SettingsError
from baton.worker.build_cpu import layout_of, longest_known
from baton.worker.settings import WorkerSettings
from baton.worker.startup import namespace_of

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def folder_of(path: Path, **fields: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPE | fields))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({}, 32768),
        ({"rope_scaling": YARN}, 131072),  # as the cards of Qwen2.5 and Qwen3 say to extend them
        ({"rope_scaling": YARN, "max_position_embeddings": 163840}, 163840),
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 131072}, 131072),  # the folder names the scaled length
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 32768),  # past it rope would depend on the steps
    ],
)
def test_longest_sequence_counts_the_rope_scaling(tmp_path, fields, longest):
    """Guards against a worker that refuses the length which YaRN gives a model, or takes one that rope does not."""
    config = ModelConfig.from_folder(folder_of(tmp_path, **fields))
    assert longest_known(WorkerSettings(), config) == longest
    assert longest_known(WorkerSettings(max_model_len=longest), config) == longest
    with pytest.raises(SettingsError, match=str(longest)):
        longest_known(WorkerSettings(max_model_len=longest + 1), config)


def dummy_namespace(folder: Path, device: str = "cpu") -> bytes:
    config = ModelConfig.from_folder(folder)
    layout = layout_of(config, torch.float32, 16)
    return namespace_of(folder, "dummy", device, layout, config)


def test_dummy_models_of_one_layout_do_not_share_kv(tmp_path):
    """Guards against KV of one random model being taken for another's: what differs may not show in the layout."""
    plain = folder_of(tmp_path / "plain")
    wider = folder_of(tmp_path / "wider", intermediate_size=96)
    assert dummy_namespace(plain) == dummy_namespace(plain)
    assert dummy_namespace(plain) != dummy_namespace(wider)
    assert dummy_namespace(plain) != dummy_namespace(plain, "cuda"), "a GPU draws other numbers"
