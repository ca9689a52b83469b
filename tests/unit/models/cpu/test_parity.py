"""Against transformers: the same logits and the same greedy tokens, for every family and every variant of a family."""

import pytest
import torch

from baton.models.cpu.runner import ModelRunner
from baton.tests.unit.models.conftest import LATENT

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.75, "rope_theta": 10000.0}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama biased, untied": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied, many heads a key head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "yarn rope": ("llama", {"rope_parameters": YARN}),
    "yarn rope, own factors": (
        "qwen2",
        {
            "rope_parameters": YARN
            | {"beta_fast": 20, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}
        },
    ),
    "yarn rope, attention factor": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 12.0, 16.0],
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 24}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window in the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, biased, window in some layers": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "deepseek_v2, queries without a latent": (
        "deepseek_v2",
        LATENT
        | {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": ("deepseek_v3", LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek_v3, halves rotated": ("deepseek_v3", LATENT | {"rope_interleave": False, "first_k_dense_replace": 3}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi3, window": ("phi3", {"sliding_window": 20, "pad_token_id": 0}),
    "phi3, a part of a head rotated": ("phi3", {"rope_parameters": PARTIAL, "pad_token_id": 0}),
    "phi3, longrope over a part of a head": (
        "phi3",
        {
            "rope_parameters": PARTIAL
            | {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 8.0],
            },
            "original_max_position_embeddings": 64,
            "hidden_size": 64,
            "pad_token_id": 0,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "qwen2-moe, a layer without experts": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3-moe, window": (
        "qwen3_moe",
        EXPERTS | {"use_sliding_window": True, "sliding_window": 20, "norm_topk_prob": True},
    ),
    "glm4-moe": ("glm4_moe", DEEPSEEK_EXPERTS | {"use_qk_norm": True, "attention_bias": True}),
    "olmoe": ("olmoe", EXPERTS | {"intermediate_size": 48, "head_dim": 12, "norm_topk_prob": True}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 24}),
    "gpt-oss, tight gates, windows in the last layers": (
        "gpt_oss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 20,
            "swiglu_limit": 1.5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 40}),
    "gemma2, tight softcaps": (
        "gemma2",
        {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 9.0, "tie_word_embeddings": False},
    ),
    "gemma3": ("gemma3", {"sliding_window": 24, "query_pre_attn_scalar": 40, "tie_word_embeddings": False}),
    "gemma3, scaled rope, few windows": (
        "gemma3",
        {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 9.0,
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_200_greedy_tokens_equal_transformers(name, make_model, sequences, prompt):
    """Guards against any difference in the decoder: a bias left out, a rope computed otherwise, a window off by one."""
    family, variant = FAMILIES[name]
    made = make_model(family, **variant)
    ours, logits = sequences(ModelRunner.load(made.folder), 1, 240).greedy(0, prompt, 200)
    with torch.inference_mode():
        # Fed with our tokens: its argmax at each place is its own greedy token as long as all before agree.
        theirs = made.reference(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    assert theirs.argmax(-1).tolist() == ours
    assert float((logits - theirs).abs().max() / theirs.abs().max()) <= 1e-4
    assert len(set(ours)) > 20, "a model that repeats itself shows nothing"


def test_tokens_equal_generate(make_model, sequences, prompt):
    """The same against transformers' own loop with its cache, in case feeding it all at once hides something."""
    made = make_model("llama")
    ours, _ = sequences(ModelRunner.load(made.folder), 1, 240).greedy(0, prompt, 60)
    theirs = made.reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=60,
        min_new_tokens=60,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert theirs[0, len(prompt) :].tolist() == ours


def test_sharded_folder_gives_the_same_logits(make_model, sequences, prompt):
    """Guards against tensors of a second shard being dropped or crossed."""
    made = make_model("qwen3", shard_size="60KB")
    assert len(list(made.folder.glob("*.safetensors"))) > 2
    _, logits = sequences(ModelRunner.load(made.folder), 1, 64).greedy(0, prompt, 1)
    with torch.inference_mode():
        theirs = made.reference(torch.tensor([prompt])).logits[0, -1]
    assert float((logits[0] - theirs).abs().max() / theirs.abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("family", "variant"), [("llama", {}), ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 40})]
)
def test_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16(family, variant, make_model, sequences, prompt):
    """Guards against a step that rounds more often than it must when the model runs in bfloat16, or chooses experts by
    rounded logits."""
    made = make_model(family, **variant)
    runner = ModelRunner.load(made.folder, dtype="bfloat16")
    assert runner.kv_dtype == torch.bfloat16
    _, logits = sequences(runner, 1, 64).greedy(0, prompt, 1)
    with torch.inference_mode():
        exact = made.reference(torch.tensor([prompt])).logits[0, -1]
        theirs = made.reference.to(torch.bfloat16)(torch.tensor([prompt])).logits[0, -1].float()
    assert float((logits[0] - exact).norm()) <= 2 * float((theirs - exact).norm())
