"""How a model turns positions into rotations: the rope part of a config, in both spellings. rope.py makes the numbers.

Old folders write `rope_theta` and `rope_scaling` {`type` or `rope_type`, ...}; transformers 5 writes one object
`rope_parameters` with `rope_theta` and `rope_type` in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.models.folder import JsonObject
from baton.node.errors import SettingsError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of the rotary embedding; the fields below `factor` matter to some kinds only."""

    kind: str
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    """Length of the pre-training, tokens (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """cos and sin are multiplied by it (yarn)."""


def read_rope(config: JsonObject, max_position: int) -> RopeConfig:
    """The rope of a config.json; SettingsError names an unknown type or a missing key."""
    rope = _rope_object(config)
    if "rope_theta" in config.fields and not config.has("rope_theta") and not rope.has("rope_theta"):
        raise config.wrong("rope_theta", "a number")
    theta = rope.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise SettingsError(f"{rope.where}: unknown rope type {kind!r}; supported: {', '.join(ROPE_KINDS)}")
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


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
