"""How families write their experts down: keys of config.json and what they leave unsaid, and names of tensors.

A table and no code, as models.families. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class DenseLayers(Enum):
    """Which layers of a model with experts have a plain MLP."""

    NONE = "none"
    LISTED = "listed"
    """Those of `mlp_only_layers`, and all but each `decoder_sparse_step`-th."""
    FIRST = "first"
    """Those before `first_k_dense_replace`, and of the rest all whose number `moe_layer_freq` does not divide."""


@dataclass(frozen=True, slots=True)
class ExpertRules:
    """Of a family whose MLPs consist of experts: keys of config.json, and the names of tensors behind a layer's."""

    default_count: int
    default_top_k: int | None
    """Where `num_experts_per_tok` is absent; None: it must be there."""
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    """The number of experts has one of these names."""
    width_key: str = "moe_intermediate_size"
    default_width: int | None = None
    """Where `width_key` is absent."""
    block: str = "mlp"
    """Begins the names of router and experts."""
    router: str = "gate"
    router_bias: bool = False
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Of an expert: gate, up and down."""
    stacked: tuple[str, str] | None = None
    """Tensors that have gate and up, by turns, and down of all experts, with their biases; None: each has its own."""
    clamped: bool = False
    """The gate of an expert is a ClampedGate, by `swiglu_limit` and `swiglu_alpha`."""
    dense_layers: DenseLayers = DenseLayers.NONE
    default_dense: int = 0
    """Where `first_k_dense_replace` is absent."""
    shared: str = ""
    """Names the shared expert, if there is one."""
    default_shared: int = 0
    """Its width where `shared_expert_intermediate_size` is absent; or, with counted_shared, the number of experts that
    it is as wide as where `n_shared_experts` is."""
    counted_shared: bool = False
    shared_gated: bool = False
    """The shared expert's output is multiplied by a gate of its own."""
    sigmoid: bool = False
    """Scores are sigmoids, corrected by a bias where experts are chosen; else a softmax."""
    renormalised: bool | None = None
    """Weights of a token are divided by their sum; None: if `norm_topk_prob`."""
    default_renormalised: bool = False
    """Where `norm_topk_prob` is absent."""
    selections: tuple[str, ...] = ()
    """Values of `topk_method` that are computed here; the first is the default. Empty: the key is not read."""
    default_scale: float | None = None
    """Where `routed_scaling_factor` is absent; None: it is not read."""
    default_groups: tuple[int | None, int | None] = (None, None)
    """Where `n_group` and `topk_group` are absent; None: they must be there, if experts are chosen by groups."""
    float32_router: bool = False
    """The router's weight stays float32."""


GREEDY, GROUP_GREEDY, CORRECTED = "greedy", "group_limited_greedy", "noaux_tc"
"""DeepSeek's names of ways to choose experts."""
MIXTRAL_EXPERTS = ExpertRules(
    default_count=8,
    default_top_k=2,
    width_key="intermediate_size",
    block="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    renormalised=True,
)
QWEN3_EXPERTS = ExpertRules(default_count=128, default_top_k=8, default_width=768, dense_layers=DenseLayers.LISTED)
QWEN2_EXPERTS = replace(
    QWEN3_EXPERTS,
    default_count=60,
    default_top_k=4,
    default_width=1408,
    shared="shared_expert",
    default_shared=5632,
    shared_gated=True,
)
DEEPSEEK_V2_EXPERTS = ExpertRules(
    default_count=64,
    default_top_k=None,
    count_keys=("n_routed_experts", "num_local_experts", "num_experts"),
    default_width=1407,
    dense_layers=DenseLayers.FIRST,
    shared="shared_experts",
    default_shared=2,
    counted_shared=True,
    renormalised=False,
    selections=(GREEDY, GROUP_GREEDY),
    default_scale=1.0,
)
DEEPSEEK_V3_EXPERTS = replace(
    DEEPSEEK_V2_EXPERTS,
    default_count=256,
    default_top_k=8,
    default_width=2048,
    default_dense=3,
    default_shared=1,
    sigmoid=True,
    renormalised=None,
    default_renormalised=True,
    selections=(CORRECTED,),
    default_scale=2.5,
    default_groups=(8, 4),
    float32_router=True,
)
GLM4_EXPERTS = replace(
    DEEPSEEK_V3_EXPERTS,
    default_count=128,
    default_width=1408,
    default_dense=1,
    default_scale=1.0,
    default_groups=(1, 1),
)
GPT_OSS_EXPERTS = ExpertRules(
    default_count=128,
    default_top_k=4,
    count_keys=("num_local_experts", "num_experts"),
    width_key="intermediate_size",
    router="router",
    router_bias=True,
    stacked=("gate_up_proj", "down_proj"),
    clamped=True,
    renormalised=True,
)
OLMOE_EXPERTS = ExpertRules(default_count=64, default_top_k=8, width_key="intermediate_size")
