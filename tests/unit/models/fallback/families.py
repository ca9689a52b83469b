"""Families of models that only transformers runs, as tiny random models; for tests here and on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

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
    "flex_olmo": EXPERTS,
    "glm4_moe_lite": LATENT,
}
"""Learned positions; other positions; other norms; experts; latent attention, whose values are narrower than keys."""
PLAIN: dict[str, object] = {}
OTHERS = {
    "apertus": PLAIN,
    "arcee": PLAIN,
    "biogpt": PLAIN,
    "codegen": {"rotary_dim": 8},
    "bitnet": PLAIN,
    "cohere": PLAIN,
    "cohere2": PLAIN,
    "cohere2_moe": PLAIN,
    "ctrl": PLAIN,
    "cwm": PLAIN,
    "ernie4_5": PLAIN,
    "exaone4": PLAIN,
    "exaone_moe": PLAIN,
    "glm": PLAIN,
    "glm4": PLAIN,
    "gpt_bigcode": PLAIN,
    "gpt_neox": PLAIN,
    "gptj": {"rotary_dim": 8},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "granitemoe": PLAIN,
    "granitemoeshared": PLAIN,
    "hyperclovax": PLAIN,
    "jais2": PLAIN,
    "minimax_m2": PLAIN,
    "ministral3": PLAIN,
    "nanochat": PLAIN,
    "nemotron": PLAIN,
    "olmo": PLAIN,
    "olmo3": PLAIN,
    "persimmon": PLAIN,
    "phi": PLAIN,
    "phimoe": PLAIN,
    "seed_oss": PLAIN,
    "smollm3": PLAIN,
    "stablelm": PLAIN,
    "starcoder2": PLAIN,
    "vaultgemma": PLAIN,
}
SMALL_MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
REFUSED_ALWAYS = {
    "bloom": "0 of its 3 layers attend",
    "minimax": "of its 3 layers attend",
    "falcon_h1": "in chunks gives other logits",
    "granite_swa": "attention sinks",
    "llama4_text": "layer 0 masks otherwise than by its window",
    "roberta": "layer 0 masks otherwise than by its window",
}
REFUSED_SHAPES = {
    "falcon_h1": SMALL_MAMBA,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
}
REFUSED_OTHERS = (
    "bamba",
    "falcon",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mamba",
    "mpt",
    "nemotron_h",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xglm",
)


weekly = pytest.mark.skipif("BATON_ALL_FAMILIES" not in os.environ, reason="BATON_ALL_FAMILIES is not set")


def make_folder(folder: Path, family: str, **config) -> transformers.PreTrainedModel:
    """Saves a random model; returns transformers' own, which attends eagerly."""
    torch.manual_seed(11)
    described = transformers.AutoConfig.for_model(family, **SHAPE | config)
    described._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(described).eval()
    for name, parameter in model.named_parameters():
        spread = torch.randn_like(parameter) * 0.2
        parameter.data = 1 + spread if "norm" in name else spread
    model.save_pretrained(folder)
    return model
