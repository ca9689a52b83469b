"""Adapters that PEFT makes of whole models that see images: what they change of the decoder, which serves text."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.models.adapters.base_rows import rows_of_folder
from baton.models.adapters.peft import read_adapter
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.node.adapter_folder import WEIGHTS_NAME
from baton.node.errors import AdapterError
from baton.tests.unit.models.cpu.test_image_folders import MODELS, made

__all__ = ["made"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:The following .*_pattern keys"
)
OPTIONS = {
    "target_modules": ["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
    "rank_pattern": {r"model.language_model.layers.1.self_attn.*": 2, "layers.2.self_attn.q_proj": 6},
    "alpha_pattern": {r".*\.language_model\.layers.0.mlp.down_proj": 13, "^model.layers": 50},
}


@pytest.mark.parametrize("made", MODELS, indirect=True)
def test_text_has_the_logits_of_the_whole_model_with_its_adapter(made, make_adapter, sequences, prompt):
    """Guards against an adapter that is refused for its names, or for pairs of what sees images, and against patterns
    that are compared with other names than PEFT compares them with."""
    model, folder = made
    adapter = make_adapter(model, **OPTIONS)
    runner = ModelRunner.load(folder, max_loras=1, max_lora_rank=8)
    read = read_adapter(adapter.folder, runner.config, rows_of_folder(folder, runner.config.tie_word_embeddings))
    runner.adapters.fill(0, runner.adapters.prepare(read))
    served = sequences(runner, 1, 64)
    rows = [row._replace(adapter=0) for row in served.chunks(0, prompt, 20)]
    for row in rows[:-1]:
        runner.step([row])
    logits = runner.compute(rows[-1:])[1][0]
    with torch.inference_mode():
        theirs, base = (each(torch.tensor([prompt])).logits[0, -1] for each in (adapter.model, model))
    assert float((logits - theirs).abs().max() / theirs.abs().max()) <= 1e-4
    assert (theirs - base).abs().max() > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize("made", ["Gemma3"], indirect=True)
def test_names_of_earlier_versions_are_the_same_modules(made, make_adapter, tmp_path):
    """Before version 4.52 of transformers `language_model.` was before the decoder's `model.`, and before its head."""
    folder = make_adapter(made[0], target_modules=["q_proj", "embed_tokens", "lm_head"]).folder
    config, rows = ModelConfig.from_folder(made[1]), rows_of_folder(made[1], tied=True)
    read = read_adapter(folder, config, rows)
    tensors = load_file(folder / WEIGHTS_NAME)
    old = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.")
        .replace("model.lm_head", "model.language_model.lm_head"): tensor
        for name, tensor in tensors.items()
    }
    assert not old.keys() & tensors.keys()
    save_file(old, folder / WEIGHTS_NAME)
    again = read_adapter(folder, config, rows)
    assert len(list(read.pairs)) == 5
    for pair, other in zip(read.pairs, again.pairs, strict=True):
        assert torch.equal(pair.a, other.a) and torch.equal(pair.b, other.b)
    save_file({name: tensor for name, tensor in old.items() if "vision" in name}, folder / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="no pair of lora_A and lora_B of the decoder"):
        read_adapter(folder, config, rows)
