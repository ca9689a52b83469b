"""The numbers of the rotary embedding: inverse frequencies of every kind, and the rotations of a step's positions.

Written with the float32 operations of transformers' modeling_rope_utils, in their order, so that angles are equal bit
for bit: at position 100,000 a last bit of a frequency is visible in the logits.
"""

from __future__ import annotations

import math

import torch

from baton.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """Radians a token for each pair of elements, float32 [rotary_dim / 2].

    `dynamic` is the unscaled rope: the scaling starts past the length that ModelConfig.max_model_len allows.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).to(torch.float) / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "longrope":
        factors = rope.long_factors if rope.use_long_factors else rope.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)
    if rope.kind == "yarn":
        return _yarn(rope.theta**exponents, rope)
    return frequencies


def rotations(
    positions: torch.Tensor, frequencies: torch.Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as kernels.apply_rope takes them, each [N, 1, 2, rotary_dim / 2]; positions int64 [N]."""
    angles = positions[:, None].float() * frequencies
    cos, sin = (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)
    return torch.stack((cos, cos), dim=1)[:, None], torch.stack((-sin, sin), dim=1)[:, None]


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by the factor, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_scaled = rope.original_max_position / rope.low_freq_factor
    scaled = torch.where(wavelengths > shortest_scaled, frequencies / rope.factor, frequencies)
    smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = ~(wavelengths < longest_kept) * ~(wavelengths > shortest_scaled)
    return torch.where(is_between, between, scaled)


def _yarn(wavelengths: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """YaRN, https://arxiv.org/abs/2309.00071: a ramp over the dimensions from extrapolation to interpolation."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = torch.clamp((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / width, 0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - extrapolated) + 1.0 / wavelengths * extrapolated
