"""The experts of a model, read from its config.json by the rules of its family. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from baton.models.expert_rules import CORRECTED, GROUP_GREEDY, DenseLayers, ExpertRules
from baton.models.folder import JsonObject

MAX_EXPERTS, MAX_EXPERT_WIDTH = 1 << 12, 1 << 22


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Of all layers that have them. kernels.routing says what the numbers of a router mean."""

    num_experts: int
    top_k: int
    width: int
    """Of one expert."""
    layers: tuple[bool, ...]
    """Which layers have experts."""
    shared_width: int
    """Of the expert that computes every token; 0: there is none."""
    shared_gated: bool
    sigmoid: bool
    """Scores are sigmoids, with corrections where experts are chosen."""
    renormalised: bool
    scale: float
    num_groups: int
    kept_groups: int
    float32_router: bool
    clamp: tuple[float, float] | None
    """Limit and alpha of kernels.ClampedGate; None: the gate has the model's activation."""
    rules: ExpertRules
    """Which names tensors have."""


def read_experts(config: JsonObject, rules: ExpertRules, num_layers: int) -> ExpertsConfig:
    """SettingsError for what no code here routes."""
    count_key = next((key for key in rules.count_keys if config.has(key)), rules.count_keys[0])
    num_experts = config.integer(count_key, rules.default_count, most=MAX_EXPERTS)
    top_k = config.integer("num_experts_per_tok", rules.default_top_k)
    if top_k > num_experts:
        raise config.wrong("num_experts_per_tok", f"at most {count_key} ({num_experts})")
    width = config.integer(rules.width_key, rules.default_width, most=MAX_EXPERT_WIDTH)
    renormalised = rules.renormalised
    if renormalised is None:
        renormalised = config.flag("norm_topk_prob", rules.default_renormalised)
    num_groups, kept_groups = _groups(config, rules, num_experts, top_k)
    return ExpertsConfig(
        num_experts=num_experts,
        top_k=top_k,
        width=width,
        layers=_layers(config, rules, num_layers),
        shared_width=_shared_width(config, rules, width),
        shared_gated=rules.shared_gated,
        sigmoid=rules.sigmoid,
        renormalised=renormalised,
        scale=1.0 if rules.default_scale is None else config.number("routed_scaling_factor", rules.default_scale),
        num_groups=num_groups,
        kept_groups=kept_groups,
        float32_router=rules.float32_router,
        clamp=_clamp(config) if rules.clamped else None,
        rules=rules,
    )


def _clamp(config: JsonObject) -> tuple[float, float]:
    limit, alpha = config.number("swiglu_limit", 7.0), config.number("swiglu_alpha", 1.702)
    if limit <= 0.0:
        raise config.wrong("swiglu_limit", "above 0")
    return limit, alpha


def _shared_width(config: JsonObject, rules: ExpertRules, width: int) -> int:
    if not rules.shared:
        return 0
    if rules.counted_shared:
        return width * config.integer("n_shared_experts", rules.default_shared, least=0, most=MAX_EXPERTS)
    return config.integer("shared_expert_intermediate_size", rules.default_shared, most=MAX_EXPERT_WIDTH)


def _groups(config: JsonObject, rules: ExpertRules, num_experts: int, top_k: int) -> tuple[int, int]:
    """How many groups the experts are in, and how many of them a token may choose from."""
    if not rules.selections:
        return 1, 1
    selection = config.text("topk_method", rules.selections[0])
    if selection not in rules.selections:
        raise config.wrong("topk_method", f"one of {', '.join(rules.selections)}")
    scoring = "sigmoid" if rules.sigmoid else "softmax"
    if config.text("scoring_func", scoring) != scoring:
        raise config.wrong("scoring_func", f"'{scoring}'")
    if selection not in (GROUP_GREEDY, CORRECTED):
        return 1, 1
    count, kept = (
        config.integer(key, default, most=num_experts)
        for key, default in zip(("n_group", "topk_group"), rules.default_groups, strict=True)
    )
    size = num_experts // count
    if num_experts % count or (rules.sigmoid and count > 1 and size < 2):
        raise config.wrong("n_group", f"a divisor of the {num_experts} experts, with two experts in a group")
    if kept > count or kept * size < top_k:
        raise config.wrong("topk_group", f"at most n_group ({count}), with room for {top_k} experts of {size} a group")
    return count, kept


def _layers(config: JsonObject, rules: ExpertRules, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts."""
    layers, dense = range(num_layers), rules.dense_layers
    if dense is DenseLayers.LISTED:
        step, listed = config.integer("decoder_sparse_step", 1), set(_numbers(config, "mlp_only_layers"))
        return tuple(layer not in listed and (layer + 1) % step == 0 for layer in layers)
    if dense is DenseLayers.FIRST:
        first = config.integer("first_k_dense_replace", rules.default_dense, least=0)
        every = config.integer("moe_layer_freq", 1)
        return tuple(layer >= first and layer % every == 0 for layer in layers)
    return (True,) * num_layers


def _numbers(config: JsonObject, key: str) -> tuple[int, ...]:
    """A list of whole numbers, empty where the key is absent or null."""
    value = config.fields.get(key)
    found = value if isinstance(value, list) else []
    numbers = tuple(each for each in found if isinstance(each, int) and not isinstance(each, bool))
    if (value is not None and not isinstance(value, list)) or len(numbers) != len(found):
        raise config.wrong(key, "a list of whole numbers")
    return numbers
