"""The scales of keys and values that a checkpoint brings, and from them the format that KV is stored in.

    key = stored * k_scale      value = stored * v_scale

One of a layer for all heads, or one for each. A scale that is missing is refused: a guess would clip or waste numbers
silently.
"""

from __future__ import annotations

from pathlib import Path

import torch

from baton.models.checkpoint import Checkpoint, StoredTensor
from baton.models.config import ModelConfig
from baton.models.kv_format import KV_DTYPES, KvFormat
from baton.models.sources import read_sources
from baton.node.errors import SettingsError

SCALES_OF_KEYS = ("k_proj.k_scale", "k_scale", "qkv_proj.k_scale", "k_proj.output_scale", "kv_scale")
SCALES_OF_VALUES = ("v_proj.v_scale", "v_scale", "qkv_proj.v_scale", "v_proj.output_scale", "kv_scale")
"""Names behind a layer's `self_attn.`, as ModelOpt, compressed-tensors and older tools write them."""
ALIGNED = 4
"""Elements of a head: scales that follow its rows are float32."""


def kv_format_of(
    kv_dtype: str, config: ModelConfig, folder: Path, dtype: torch.dtype, load_format: str = "auto"
) -> KvFormat:
    """The format for one of KV_DTYPES; SettingsError if the model has no such. dtype: of `auto`."""
    if kv_dtype not in KV_DTYPES:
        raise SettingsError(f"KV dtype {kv_dtype!r} is unknown; known: {', '.join(KV_DTYPES)}")
    if kv_dtype == "auto":
        return KvFormat.plain(dtype)
    if config.latent is not None:
        raise SettingsError(f"--kv-dtype {kv_dtype}: not supported for {config.architecture}, whose KV is latents")
    if config.head_dim % ALIGNED:
        raise SettingsError(f"--kv-dtype {kv_dtype}: heads of {config.head_dim} elements, no multiple of {ALIGNED}")
    if kv_dtype == "fp8":
        return KvFormat.fp8()
    if load_format == "dummy":
        return KvFormat.fp8(torch.ones(config.num_layers, 2, config.num_kv_heads))
    return KvFormat.fp8(read_kv_scales(Checkpoint.open(folder), config))


def read_kv_scales(checkpoint: Checkpoint, config: ModelConfig) -> torch.Tensor:
    """float32 [layers, 2, KV heads]; SettingsError if one is missing, of another shape, or no number above zero."""
    stored: dict[str, StoredTensor] = {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for plane, names in enumerate((SCALES_OF_KEYS, SCALES_OF_VALUES)):
            found = [tensor for name in names if (tensor := checkpoint.find(prefix + name)) is not None]
            if not found:
                raise SettingsError(
                    f"{checkpoint.folder}: {prefix}{names[1]} is missing, a scale that --kv-dtype fp8_static needs; "
                    "--kv-dtype fp8 needs none"
                )
            stored[f"{layer} {plane}"] = found[0]
    scales = torch.empty(config.num_layers, 2, config.num_kv_heads)
    for place, tensors in read_sources(checkpoint, stored):
        layer, plane = map(int, place.split())
        (values,), name = (each.float().flatten() for each in tensors.values()), stored[place].name
        if len(values) not in (1, config.num_kv_heads):
            raise SettingsError(
                f"{checkpoint.folder}: {name} has {len(values)} scales, expected 1 or {config.num_kv_heads}"
            )
        if not bool((values.isfinite() & (values > 0)).all()):
            raise SettingsError(f"{checkpoint.folder}: {name} is no number above zero everywhere")
        scales[layer, plane] = values
    return scales
