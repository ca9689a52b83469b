"""The weights of a decoder as plain tensors, read from safetensors shards. Only safetensors: nothing is unpickled.

Query, key and value projections are merged into one matrix, gate and up into another: one multiplication instead of
three or two. Rows are copied shard by shard into the merged tensors, so that memory peaks at the model plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.config import ModelConfig
from models.fingerprint import weight_files
from node.errors import SettingsError

Progress = Callable[[int, int], None]

LOAD_FORMATS = ("auto", "dummy")
DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in]; Q = num_heads * head_dim, K = num_kv_heads * head_dim, I = intermediate."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [Q + 2 K, hidden]
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]: the query's for each head, then the key's
    o: torch.Tensor  # [hidden, Q]
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 I, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, I]
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole decoder; lm_head is the embedding itself where the two are tied."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [vocab, hidden]


def no_progress(done: int, total: int) -> None:
    """The on_progress that tells nobody."""


def load_weights(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    device: str = "cpu",
    load_format: str = "auto",
    on_progress: Progress = no_progress,
) -> Weights:
    """The folder's weights in `dtype`; `dummy` makes random ones, the same in every process, without reading any.

    on_progress(done, total) counts tensors. Raises SettingsError for a missing shard or tensor, a file that is cut off or
    no safetensors, and a wrong shape, naming it.
    """
    if load_format not in LOAD_FORMATS:
        raise SettingsError(f"load_format {load_format!r} is unknown; known: {', '.join(LOAD_FORMATS)}")
    weights, places = _allocate(config, dtype, device)
    if load_format == "dummy":
        _fill_randomly(places)
        return weights
    done = 0
    missing = dict(places)
    for name, tensor in _tensors(folder, places):
        place = missing.pop(name, None)
        if place is None:
            continue
        if tensor.shape != place.shape[-tensor.dim() :] or tensor.dim() < place.dim() - 1:
            raise SettingsError(f"{folder}: tensor {name} has shape {list(tensor.shape)}, expected {list(place.shape)}")
        if not tensor.is_floating_point():
            raise SettingsError(f"{folder}: tensor {name} is {tensor.dtype}, expected floating point")
        place.copy_(tensor)
        done += 1
        on_progress(done, len(places))
    if missing:
        raise SettingsError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} of {len(places)} are)")
    return weights


def _tensors(folder: Path, wanted: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted tensors, file by file."""
    for shard, listed in weight_files(folder).items():
        path = folder / shard
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                held = set(file.keys())
                for name in listed:
                    if name in wanted and name not in held:
                        raise SettingsError(f"{path}: tensor {name} is missing; the index says it is here")
                for name in sorted(held & wanted.keys()):
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"{path}: not a whole safetensors file: {error}") from None


def _allocate(config: ModelConfig, dtype: torch.dtype, device: str) -> tuple[Weights, dict[str, torch.Tensor]]:
    """Uninitialised weights, and by Hugging Face name the part of them that each tensor fills."""
    places: dict[str, torch.Tensor] = {}

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def named(name: str, *shape: int) -> torch.Tensor:
        places[name] = empty(*shape)
        return places[name]

    def merged(prefix: str, names: tuple[str, ...], rows: tuple[int, ...], suffix: str, *columns: int) -> torch.Tensor:
        whole = empty(sum(rows), *columns)
        for name, part in zip(names, whole.split(rows), strict=True):
            places[f"{prefix}{name}.{suffix}"] = part
        return whole

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = named("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = []
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = (attention, ("q_proj", "k_proj", "v_proj"), (q_size, kv_size, kv_size))
        gate_up = (mlp, ("gate_proj", "up_proj"), (inner, inner))
        qk_norm = None
        if config.qk_norm:
            qk_norm = empty(config.num_heads + config.num_kv_heads, config.head_dim)
            places[f"{attention}q_norm.weight"], places[f"{attention}k_norm.weight"] = qk_norm.split(
                (config.num_heads, config.num_kv_heads)
            )
        layers.append(
            LayerWeights(
                input_norm=named(f"{prefix}input_layernorm.weight", hidden),
                qkv=merged(*qkv, "weight", hidden),
                qkv_bias=merged(*qkv, "bias") if config.qkv_bias else None,
                qk_norm=qk_norm,
                o=named(f"{attention}o_proj.weight", hidden, q_size),
                o_bias=named(f"{attention}o_proj.bias", hidden) if config.o_bias else None,
                post_norm=named(f"{prefix}post_attention_layernorm.weight", hidden),
                gate_up=merged(*gate_up, "weight", hidden),
                gate_up_bias=merged(*gate_up, "bias") if config.mlp_bias else None,
                down=named(f"{mlp}down_proj.weight", hidden, inner),
                down_bias=named(f"{mlp}down_proj.bias", hidden) if config.mlp_bias else None,
            )
        )
    norm = named("model.norm.weight", hidden)
    lm_head = embedding if config.tie_word_embeddings else named("lm_head.weight", config.vocab_size, hidden)
    return Weights(embedding, tuple(layers), norm, lm_head), places


def _fill_randomly(places: dict[str, torch.Tensor]) -> None:
    """Norm weights 1, biases 0, the rest normal: a decoder that computes, though it says nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, place in places.items():
        if name.endswith("norm.weight"):
            place.fill_(1.0)
        elif name.endswith(".bias"):
            place.zero_()
        else:
            place.copy_(torch.empty(place.shape, dtype=torch.float32).normal_(0.0, DUMMY_STD, generator=generator))
