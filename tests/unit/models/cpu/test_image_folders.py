"""Models that see images, served as models of text: the logits of transformers' whole model for a prompt of text."""

import json

import pytest
import torch
import transformers

from baton.models.config import ModelConfig, UnsupportedModel
from baton.models.cpu.runner import ModelRunner
from baton.tests.unit.models.conftest import SHAPE

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = VISION | {"image_size": 28, "patch_size": 14}
DEPTH = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": SHAPE["hidden_size"],
}
THREE_NUMBERS = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
QWEN = {"rope_parameters": THREE_NUMBERS, "bos_token_id": 1, "hidden_size": 64, "tie_word_embeddings": False}
MODELS = {
    "Gemma3": ({"sliding_window": 8, "query_pre_attn_scalar": 20}, PATCHES | {"model_type": "siglip_vision_model"}),
    "Mistral3": ({"model_type": "mistral", "sliding_window": None}, PATCHES | {"model_type": "pixtral"}),
    "Llava": ({"model_type": "llama"}, PATCHES | {"model_type": "clip_vision_model"}),
    "Qwen2_5_VL": (QWEN, DEPTH | {"out_hidden_size": 64}),
    "Qwen3VL": (QWEN, DEPTH | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}),
}


@pytest.fixture
def made(request, tmp_path):
    """The whole model of a name in MODELS, and its folder."""
    text, vision = MODELS[request.param]
    config = getattr(transformers, f"{request.param}Config")(text_config=SHAPE | text, vision_config=vision)
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    model = getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        spread = torch.randn_like(parameter) * 0.2
        parameter.data = 1 + spread if "norm" in name else spread
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("made", MODELS, indirect=True)
def test_text_has_the_logits_of_the_whole_model(made, sequences, prompt):
    """Guards against a folder that is refused for its images, and a decoder read from the wrong keys or tensors."""
    model, folder = made
    ours, logits = sequences(ModelRunner.load(folder), 1, 64).greedy(0, prompt, 12)
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    assert theirs.argmax(-1).tolist() == ours
    assert float((logits - theirs).abs().max() / theirs.abs().max()) <= 1e-4


def test_a_flat_file_of_qwen_and_a_short_one_of_gemma(tmp_path):
    """Published files: Qwen2.5-VL's has the decoder's keys beside the vision_config, Gemma 3's leaves out defaults."""

    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelConfig.from_folder(tmp_path)

    flat = SHAPE | {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    scaling = {"type": "mrope", "mrope_section": [2, 3, 3]}
    found = read(flat | {"vision_config": DEPTH, "rope_scaling": scaling, "tie_word_embeddings": True})
    assert (found.architecture, found.rope.kind, found.tie_word_embeddings) == ("Qwen2ForCausalLM", "default", True)
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 2}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    short, theirs = read(whole | {"text_config": text}), transformers.Gemma3TextConfig(**text)
    assert (short.num_heads, short.head_dim) == (theirs.num_attention_heads, theirs.head_dim)
    assert (short.vocab_size, short.max_position_embeddings) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert short.eos_token_ids == (1, 106)
    with pytest.raises(UnsupportedModel, match="phi"):
        read(whole | {"text_config": text | {"model_type": "phi"}})
