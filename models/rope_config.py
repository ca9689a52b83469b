"""How a model turns positions into rotations: the rope part of a config, in both spellings. rope.py makes the numbers.

Old folders write `rope_theta` and `rope_scaling` {`type` or `rope_type`, ...}; transformers 5 writes one object
`rope_parameters` with `rope_theta` and `rope_type` in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from baton.models.folder import JsonObject
from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of the rotary embedding; the fields below `factor` matter to some kinds only."""

    kind: str
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    """Length of the pre-training, tokens (llama3, yarn, longrope)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """cos and sin are multiplied by it (yarn, longrope)."""
    short_factors: tuple[float, ...] = ()
    """One for each pair of elements (longrope); wavelengths are multiplied by them."""
    long_factors: tuple[float, ...] = ()
    use_long_factors: bool = False

    def up_to(self, max_model_len: int) -> RopeConfig:
        """The rope of a server whose sequences have at most so many tokens.

        Longrope has two sets of factors. transformers picks one at each step by the longest sequence in it, so that KV
        would depend on a sequence's neighbours and on its own later length. Here, as in vLLM, a server that serves
        sequences beyond the pre-training's length uses the long factors for all.
        """
        if self.kind != "longrope":
            return self
        return replace(self, use_long_factors=max_model_len > self.original_max_position)


def read_rope(config: JsonObject, max_position: int, head_dim: int) -> RopeConfig:
    """The rope of a config.json; SettingsError names an unknown type or a missing key."""
    rope = _rope_object(config)
    if "rope_theta" in config.fields and not config.has("rope_theta") and not rope.has("rope_theta"):
        raise config.wrong("rope_theta", "a number")
    theta = rope.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    if theta <= 1.0:
        raise (rope if rope.has("rope_theta") else config).wrong("rope_theta", "above 1")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise SettingsError(
            f"{rope.where}: unknown rope type {excerpt(kind, 80)!r}; supported: {', '.join(ROPE_KINDS)}"
        )
    if any(isinstance(value, dict) for value in rope.fields.values()):
        raise SettingsError(f"{rope.where}: a rope for each layer type is not supported")
    partial = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise SettingsError(f"{rope.where}: partial_rotary_factor {partial} is not supported, only 1")
    if kind == "default":
        return RopeConfig(kind, theta)
    original = config.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position)
    )
    if kind == "yarn":
        return _yarn(rope, theta, original, max_position)
    if kind == "longrope":
        return _longrope(rope, theta, original, max_position, head_dim // 2)
    factor = rope.number("factor")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise SettingsError(f"{rope.where}: 'high_freq_factor' must be above 'low_freq_factor'")
        return RopeConfig(kind, theta, factor, original, low, high)
    return RopeConfig(kind, theta, factor, max_position)


def _rope_object(config: JsonObject) -> JsonObject:
    """`rope_scaling`, unless it is empty; then `rope_parameters`: tools that know both spellings leave an empty one."""
    for key in ("rope_scaling", "rope_parameters"):
        found = config.child(key)
        if found is not None and found.fields:
            return found
    return JsonObject(config.where, {})


def _yarn(rope: JsonObject, theta: float, original: int, max_position: int) -> RopeConfig:
    """YaRN, https://arxiv.org/abs/2309.00071, with the defaults of transformers."""
    factor = rope.number("factor", max_position / original)
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif rope.fields.get("mscale") and rope.fields.get("mscale_all_dim"):
        attention_factor = _mscale(factor, rope.number("mscale")) / _mscale(factor, rope.number("mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _longrope(rope: JsonObject, theta: float, original: int, max_position: int, num_pairs: int) -> RopeConfig:
    """LongRoPE, https://arxiv.org/abs/2402.13753, with the defaults of transformers."""
    factors = {key: rope.numbers(key) for key in ("short_factor", "long_factor")}
    for key, values in factors.items():
        if len(values) != num_pairs:
            raise rope.wrong(key, f"a list of {num_pairs} numbers, half of head_dim")
    factor = rope.number("factor", max_position / original)
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif factor <= 1.0:
        attention_factor = 1.0
    elif original < 2:
        raise rope.wrong("original_max_position_embeddings", "at least 2")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    longrope = RopeConfig(
        "longrope",
        theta,
        factor,
        original,
        attention_factor=attention_factor,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )
    return longrope.up_to(max_position)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
