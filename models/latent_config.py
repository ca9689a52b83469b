"""The shape of latent attention, read from a model's config.json by the rules of its family. No torch.

A token's keys and values are made of a latent that all heads share, and of one key that is rotated; both are cached
instead (DeepSeek-AI, DeepSeek-V2, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.models.folder import JsonObject

MAX_LATENT = 1 << 14
LATENT_NORM_EPS = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps` is: as in transformers."""


@dataclass(frozen=True, slots=True)
class LatentRules:
    """Of a family with latent attention."""

    reads_interleave: bool = False
    """`rope_interleave` counts; else pairs are neighbours always."""


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Sizes are counts of elements; those of parts are of one head."""

    query_rank: int | None
    """Of the latent that queries are made of; None: they are made of hidden states."""
    latent_dim: int
    """Of the latent that keys and values are made of."""
    plain_dim: int
    """Of a query's and a key's part that is not rotated."""
    rotated_dim: int
    value_dim: int
    interleaved: bool
    """Pairs that are rotated are neighbours in the checkpoint, not halves apart."""

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rotated_dim

    @property
    def row_dim(self) -> int:
        """Of what is cached of a token."""
        return self.latent_dim + self.rotated_dim


def read_latent(config: JsonObject, rules: LatentRules) -> LatentConfig:
    """With transformers' defaults, which are those of DeepSeek-V2 and V3."""
    if config.flag("attention_bias", False):
        raise config.wrong("attention_bias", "false")
    query_rank = None
    if config.has("q_lora_rank") or "q_lora_rank" not in config.fields:
        query_rank = config.integer("q_lora_rank", 1536, most=MAX_LATENT)
    rotated_dim = config.integer("qk_rope_head_dim", 64, most=MAX_LATENT)
    if rotated_dim % 2:
        raise config.wrong("qk_rope_head_dim", "even")
    return LatentConfig(
        query_rank=query_rank,
        latent_dim=config.integer("kv_lora_rank", 512, most=MAX_LATENT),
        plain_dim=config.integer("qk_nope_head_dim", 128, most=MAX_LATENT),
        rotated_dim=rotated_dim,
        value_dim=config.integer("v_head_dim", 128, most=MAX_LATENT),
        interleaved=not rules.reads_interleave or config.flag("rope_interleave", True),
    )
