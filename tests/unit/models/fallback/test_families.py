"""Models that only transformers runs: over the paged pool they give its tokens, or they are refused.

A handful runs always; all of them with BATON_ALL_FAMILIES set, as once a week.
"""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import save_file

from baton.models.check import check
from baton.models.cpu.runner import ModelRunner
from baton.models.fallback import config as fallback_config
from baton.node.errors import SettingsError

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 7,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
ALWAYS = {
    "gpt2": {},
    "opt": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "deepseek_v3": LATENT,
}
"""Learned positions; other positions; other norms; experts; latent attention, whose values are narrower than keys."""
PLAIN: dict[str, object] = {}
OTHERS = {
    "biogpt": PLAIN,
    "codegen": {"rotary_dim": 8},
    "cohere2": PLAIN,
    "deepseek_v2": LATENT | {"topk_method": "group_limited_greedy"},
    "ernie4_5": PLAIN,
    "exaone4": PLAIN,
    "glm4": PLAIN,
    "glm4_moe": PLAIN,
    "gpt_bigcode": PLAIN,
    "gpt_neox": PLAIN,
    "gptj": {"rotary_dim": 8},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "nemotron": PLAIN,
    "olmo3": PLAIN,
    "persimmon": PLAIN,
    "phi": PLAIN,
    "phimoe": PLAIN,
    "smollm3": PLAIN,
    "stablelm": PLAIN,
    "starcoder2": PLAIN,
}
REFUSED_ALWAYS = {
    "bloom": "0 of its 3 layers attend",
    "minimax": "of its 3 layers attend",
    "falcon_h1": "in chunks gives other logits",
    "gpt_oss": "attention sinks",
}
REFUSED_OTHERS = (
    "bamba",
    "falcon",
    "granitemoehybrid",
    "jamba",
    "mamba",
    "mpt",
    "nemotron_h",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xglm",
)

weekly = pytest.mark.skipif("BATON_ALL_FAMILIES" not in os.environ, reason="BATON_ALL_FAMILIES is not set")


@pytest.fixture
def make(tmp_path):
    """make(family, **config) saves a random model; gives its folder and transformers' own."""

    def make(family, **config):
        torch.manual_seed(11)
        described = transformers.AutoConfig.for_model(family, **SHAPE | config)
        described._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(described).eval()
        for name, parameter in model.named_parameters():
            spread = torch.randn_like(parameter) * 0.2
            parameter.data = 1 + spread if "norm" in name else spread
        model.save_pretrained(tmp_path)
        return tmp_path, model

    return make


def check_tokens(made, sequences, prompt):
    folder, reference = made
    check(folder, "auto", None)
    runner = ModelRunner.load(folder)
    assert runner.config.through.startswith("transformers ")
    ours, logits = sequences(runner, 1, 128).greedy(0, prompt, 60, chunk=20)
    with torch.inference_mode():
        theirs = reference(torch.tensor([prompt + ours]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    assert theirs.argmax(-1).tolist() == ours
    assert float((logits - theirs).abs().max() / theirs.abs().max()) <= 1e-4


@pytest.mark.parametrize("family", ALWAYS)
def test_tokens_equal_transformers(family, make, sequences, prompt):
    """Guards the paged pool behind an attention of the library: positions, scales, windows, logits of kept tokens."""
    check_tokens(make(family, **ALWAYS[family]), sequences, prompt)


@weekly
@pytest.mark.parametrize("family", OTHERS)
def test_tokens_of_other_families_equal_transformers(family, make, sequences, prompt):
    check_tokens(make(family, **OTHERS[family]), sequences, prompt)


@pytest.mark.parametrize("family", REFUSED_ALWAYS)
def test_state_outside_of_attention_is_refused(family, make):
    """Guards against wrong answers without an error: each of these runs, and gives other logits over the pool."""
    folder, _ = make(family)
    with pytest.raises(SettingsError, match=REFUSED_ALWAYS[family]):
        ModelRunner.load(folder)


@weekly
@pytest.mark.parametrize("family", REFUSED_OTHERS)
def test_other_families_are_refused(family, make):
    try:
        folder, _ = make(family)
    except Exception as error:
        pytest.skip(f"this version of transformers makes no such tiny model: {error}")
    with pytest.raises(SettingsError):
        ModelRunner.load(folder)


def test_code_of_a_folder_is_not_run(make):
    folder, _ = make("gpt2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(SettingsError, match="never run"):
        check(folder, "auto", None)


def test_without_the_library_an_error_says_how_to_get_it(make, monkeypatch):
    folder, _ = make("gpt2")

    def absent(name):
        raise fallback_config.PackageNotFoundError(name)

    monkeypatch.setattr(fallback_config, "version", absent)
    with pytest.raises(SettingsError, match=r"GPT2LMHeadModel is not supported.*baton-serve\[transformers\]"):
        check(folder, "auto", None)


def test_a_native_family_for_another_task_is_refused(make):
    """Guards against a classifier that is served as if it wrote text: the library makes a decoder of its folder."""
    folder, _ = make("qwen2")
    path = folder / "config.json"
    named = {"architectures": ["Qwen2ForSequenceClassification"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with pytest.raises(SettingsError, match="Qwen2ForSequenceClassification is not supported; supported:"):
        check(folder, "auto", None)


def test_a_missing_tensor_is_named(make):
    """Guards against weights that the library draws at random where the files have none."""
    folder, model = make("gpt2")
    tensors = {
        name: each for name, each in model.state_dict().items() if "h.1.attn" not in name and name != "lm_head.weight"
    }
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(SettingsError, match=r"h\.1\.attn.* is missing"):
        ModelRunner.load(folder)


def test_quantisation_is_refused(make):
    folder, _ = make("gpt2")
    with pytest.raises(SettingsError, match="runs through transformers"):
        check(folder, "auto", None, "fp8")
