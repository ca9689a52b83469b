"""How a model turns positions into rotations: the rope part of a config, in both spellings. rope.py makes the numbers.

Old folders write `rope_theta` and `rope_scaling` {`type` or `rope_type`, ...}; transformers 5 writes one object
`rope_parameters` with `rope_theta` and `rope_type` in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from baton.models.families import Family
from baton.models.folder import Json, JsonObject
from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt

SPELLINGS = {"su": "longrope", "mrope": "default"}
"""Older names of a kind; rotations by three numbers are the usual ones in a text."""
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
NO_ROPE: Mapping[str, Json] = MappingProxyType({})
DEFAULT_THETA = 10000.0
"""Of layers with a window that have a rope of their own."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of the rotary embedding; the fields below `factor` matter to some kinds only."""

    kind: str
    theta: float
    rotary_dim: int
    """The first elements of a head are rotated, so many; the others pass as they are."""
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


def read_ropes(
    config: JsonObject, family: Family, max_position: int, head_dim: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rope of a config.json, and that of layers with a window where the family has two; SettingsError names an
    unknown type or a missing key."""

    def read(rope: JsonObject, theta_key: str, default_theta: float) -> RopeConfig:
        if theta_key in config.fields and not config.has(theta_key) and not rope.has("rope_theta"):
            raise config.wrong(theta_key, "a number")
        theta = rope.number("rope_theta", config.number(theta_key, default_theta))
        if theta <= 1.0:
            raise rope.wrong("rope_theta", "above 1") if rope.has("rope_theta") else config.wrong(theta_key, "above 1")
        return _read_rope(config, rope, theta, max_position, head_dim, family.default_rotary)

    rope, of_windows = _rope_object(config, family.default_rope), JsonObject(config.where, {})
    if family.window_rope and "full_attention" in rope.fields:
        of_windows = rope.child("sliding_attention") or of_windows
        rope = rope.child("full_attention") or JsonObject(config.where, {})
    everywhere = read(rope, "rope_theta", family.default_theta)
    return everywhere, read(of_windows, "rope_local_base_freq", DEFAULT_THETA) if family.window_rope else None


def score_factor(config: JsonObject, rope: RopeConfig) -> float:
    """What latent attention multiplies scores by, where its rope is scaled: the square of YaRN's factor for
    `mscale_all_dim`."""
    scaling = _rope_object(config)
    if rope.kind == "default" or not scaling.fields.get("mscale_all_dim"):
        return 1.0
    return _mscale(rope.factor, scaling.number("mscale_all_dim")) ** 2


def _read_rope(
    config: JsonObject, rope: JsonObject, theta: float, max_position: int, head_dim: int, default_rotary: float | None
) -> RopeConfig:
    kind = rope.text("rope_type", rope.text("type", "default"))
    kind = SPELLINGS.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise SettingsError(
            f"{rope.where}: unknown rope type {excerpt(kind, 80)!r}; supported: {', '.join(ROPE_KINDS)}"
        )
    if any(isinstance(value, dict) for value in rope.fields.values()):
        raise SettingsError(f"{rope.where}: a rope for each layer type is not supported")
    partial = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", default_rotary or 1.0))
    rotary_dim = int(head_dim * partial)
    if partial != 1.0 and default_rotary is None:
        raise SettingsError(f"{rope.where}: partial_rotary_factor {partial} is not supported for this model, only 1")
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise SettingsError(
            f"{rope.where}: partial_rotary_factor {partial} makes {rotary_dim} of head_dim {head_dim}, "
            "which must be even and neither 0 nor more"
        )
    if kind == "default":
        return RopeConfig(kind, theta, rotary_dim)
    original = config.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position)
    )
    if kind == "yarn":
        return _yarn(rope, theta, rotary_dim, original, max_position)
    if kind == "longrope":
        return _longrope(rope, theta, rotary_dim, original, max_position)
    factor = rope.number("factor")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise SettingsError(f"{rope.where}: 'high_freq_factor' must be above 'low_freq_factor'")
        return RopeConfig(kind, theta, rotary_dim, factor, original, low, high)
    return RopeConfig(kind, theta, rotary_dim, factor, max_position)


def _rope_object(config: JsonObject, default: Mapping[str, Json] = NO_ROPE) -> JsonObject:
    """`rope_scaling`, unless it is empty; then `rope_parameters`: tools that know both spellings leave an empty one."""
    for key in ("rope_scaling", "rope_parameters"):
        found = config.child(key)
        if found is not None and found.fields:
            return found
    return JsonObject(config.where, dict(default))


def _yarn(rope: JsonObject, theta: float, rotary_dim: int, original: int, max_position: int) -> RopeConfig:
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
        rotary_dim,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _longrope(rope: JsonObject, theta: float, rotary_dim: int, original: int, max_position: int) -> RopeConfig:
    """LongRoPE, https://arxiv.org/abs/2402.13753, with the defaults of transformers."""
    factors = {key: rope.numbers(key) for key in ("short_factor", "long_factor")}
    for key, values in factors.items():
        if len(values) != rotary_dim // 2:
            raise rope.wrong(key, f"a list of {rotary_dim // 2} numbers, half of what is rotated of a head")
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
        rotary_dim,
        factor,
        original,
        attention_factor=attention_factor,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )
    return longrope.up_to(max_position)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
