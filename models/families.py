"""The families of decoders that run natively: what a config.json of each leaves unsaid, and which of its keys count.

A table and no code: a family that differs in data only is a line here. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from baton.models.expert_rules import (
    DEEPSEEK_V2_EXPERTS,
    DEEPSEEK_V3_EXPERTS,
    GLM4_EXPERTS,
    GPT_OSS_EXPERTS,
    MIXTRAL_EXPERTS,
    OLMOE_EXPERTS,
    QWEN2_EXPERTS,
    QWEN3_EXPERTS,
    ExpertRules,
)
from baton.models.folder import Json
from baton.models.latent_config import LatentRules

SCORE_SOFTCAP, LOGIT_SOFTCAP = "attn_logit_softcapping", "final_logit_softcapping"


GPT_OSS_ROPE: Mapping[str, Json] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
SILU, GELU_TANH = "silu", "gelu_pytorch_tanh"
"""Activations, as transformers names them."""


class Windows(Enum):
    """Which layers see a sliding window."""

    NONE = "none"
    ALL = "all"
    """All that there are, if `sliding_window` is a number."""
    QWEN = "qwen"
    """If `use_sliding_window`: those of `layer_types`, or from `max_window_layers` on."""
    QWEN_MOE = "qwen_moe"
    """If `use_sliding_window`: those of `layer_types`, or every second one before `max_window_layers`."""
    SWITCHED = "switched"
    """All, if `use_sliding_window`."""
    ALTERNATING = "alternating"
    """Those of `layer_types`, or all but each `sliding_window_pattern`-th."""


@dataclass(frozen=True, slots=True)
class Family:
    """The defaults are those of transformers for the family."""

    model_type: str
    activation_key: str = "hidden_act"
    activation: str = SILU
    """The only one; transformers' name."""
    old_activation: str | None = None
    """Another name for it in old folders."""
    windows: Windows = Windows.NONE
    default_window: int | None = None
    """Where `sliding_window` is absent."""
    default_pattern: int = 1
    """Where `sliding_window_pattern` is absent."""
    default_kv_heads: int | None = None
    """Where `num_key_value_heads` is absent; None: as many as query heads, as in all families where it is null."""
    default_head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    default_eps: float = 1e-6
    always_qkv_bias: bool = False
    reads_qkv_bias: bool = False
    """`qkv_bias` counts; it is true where it is absent."""
    reads_attention_bias: bool = False
    """`attention_bias` counts."""
    default_attention_bias: bool = False
    """Where `attention_bias` is absent."""
    attention_bias_of_o: bool = True
    """It is also of the projection behind attention."""
    reads_mlp_bias: bool = False
    default_tied: bool = False
    default_theta: float = 10_000.0
    qk_norm: bool = False
    whole_qk_norm: bool = False
    """Its norms are of all heads of a token together."""
    reads_qk_norm: bool = False
    """`use_qk_norm` counts; it is false where it is absent."""
    default_rotary: float | None = None
    """The part of a head that is rotated where `partial_rotary_factor` is absent; None: all of it, always."""
    default_rope: Mapping[str, Json] = field(default_factory=dict)
    """`rope_parameters` where nothing is said of a rope."""
    merged_projections: bool = False
    """The checkpoint has query, key and value, and gate and up, in one tensor each."""
    window_rope: bool = False
    """Windowed layers have a rope of their own."""
    like_gemma: bool = False
    """Norms multiply by 1 + weight and embeddings are scaled by the root of their width."""
    output_norms: bool = False
    """What attention and the MLP add to the residual is normed before."""
    reads_query_scalar: bool = False
    """Scores are divided by the root of `query_pre_attn_scalar`, not of head_dim."""
    softcaps: Mapping[str, float | None] = field(default_factory=dict)
    """The keys of softcaps that count, and their defaults; None: no softcap."""
    sinks: bool = False
    """Each head has a learned score more, whose weight goes nowhere."""
    refused: tuple[str, ...] = ()
    """Keys whose values, if there are any, nothing here computes."""
    experts: ExpertRules | None = None
    """None: all MLPs are dense."""
    latent: LatentRules | None = None
    """None: keys and values are cached."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": Family("mistral", windows=Windows.ALL, default_window=4096, default_kv_heads=8),
    "Qwen2ForCausalLM": Family(
        "qwen2", windows=Windows.QWEN, default_window=4096, default_kv_heads=32, always_qkv_bias=True
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        windows=Windows.QWEN,
        default_window=4096,
        default_kv_heads=32,
        default_head_dim=128,
        reads_attention_bias=True,
        qk_norm=True,
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        windows=Windows.ALL,
        default_kv_heads=8,
        default_eps=1e-5,
        default_theta=1_000_000.0,
        experts=MIXTRAL_EXPERTS,
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        windows=Windows.QWEN_MOE,
        default_window=4096,
        default_kv_heads=16,
        reads_qkv_bias=True,
        experts=QWEN2_EXPERTS,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        windows=Windows.SWITCHED,
        default_window=4096,
        default_kv_heads=4,
        reads_attention_bias=True,
        qk_norm=True,
        experts=QWEN3_EXPERTS,
    ),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", experts=DEEPSEEK_V2_EXPERTS, latent=LatentRules()),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3", experts=DEEPSEEK_V3_EXPERTS, latent=LatentRules(reads_interleave=True)
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        default_kv_heads=8,
        default_eps=1e-5,
        reads_attention_bias=True,
        attention_bias_of_o=False,
        reads_qk_norm=True,
        default_rotary=0.5,
        experts=GLM4_EXPERTS,
    ),
    "OlmoeForCausalLM": Family(
        "olmoe",
        default_eps=1e-5,
        reads_attention_bias=True,
        qk_norm=True,
        whole_qk_norm=True,
        refused=("clip_qkv",),
        experts=OLMOE_EXPERTS,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        windows=Windows.ALTERNATING,
        default_window=128,
        default_pattern=2,
        default_kv_heads=8,
        default_head_dim=64,
        default_eps=1e-5,
        reads_attention_bias=True,
        default_attention_bias=True,
        default_theta=150_000.0,
        default_rope=GPT_OSS_ROPE,
        sinks=True,
        experts=GPT_OSS_EXPERTS,
    ),
    "Phi3ForCausalLM": Family(
        "phi3", windows=Windows.ALL, default_eps=1e-5, default_rotary=1.0, merged_projections=True
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        activation=GELU_TANH,
        old_activation="gelu",
        default_kv_heads=16,
        default_head_dim=256,
        default_tied=True,
        reads_attention_bias=True,
        like_gemma=True,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        activation_key="hidden_activation",
        activation=GELU_TANH,
        windows=Windows.ALTERNATING,
        default_window=4096,
        default_pattern=2,
        default_kv_heads=4,
        default_head_dim=256,
        default_tied=True,
        reads_attention_bias=True,
        like_gemma=True,
        output_norms=True,
        reads_query_scalar=True,
        softcaps={SCORE_SOFTCAP: 50.0, LOGIT_SOFTCAP: 30.0},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        activation_key="hidden_activation",
        activation=GELU_TANH,
        windows=Windows.ALTERNATING,
        default_window=4096,
        default_pattern=6,
        default_kv_heads=4,
        default_head_dim=256,
        default_tied=True,
        default_theta=1_000_000.0,
        reads_attention_bias=True,
        qk_norm=True,
        window_rope=True,
        like_gemma=True,
        output_norms=True,
        reads_query_scalar=True,
        softcaps={LOGIT_SOFTCAP: None},
    ),
}
"""By the name in `architectures`."""
MODEL_TYPES = {family.model_type: architecture for architecture, family in FAMILIES.items()}
