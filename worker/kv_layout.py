"""Which layout a worker's KV has: from the model's configuration, and the format that its KV is stored in."""

from __future__ import annotations

import torch

from baton.kvtransfer.blocks.layout import KVLayout, Scales
from baton.models.config import ModelConfig
from baton.models.kv_format import KvFormat
from baton.models.partition import ONLY_STAGE, Stage


def layout_of(
    config: ModelConfig,
    kv_format: KvFormat,
    block_tokens: int,
    stage: Stage = ONLY_STAGE,
    *,
    has_draft: bool = False,
) -> KVLayout:
    """Of the stage's layers. has_draft: the KV of a draft is one more."""
    scales: Scales = "none"
    if kv_format.quantised:
        scales = "token" if kv_format.has_scales_inside else "static"
    return KVLayout.of_model(
        num_layers=len(stage.layers(config.num_layers)) + has_draft,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=name_of(kv_format.dtype),
        scales=scales,
        scales_digest=kv_format.scales_digest(),
        planes=config.kv_planes,
    )


def name_of(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")
