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

from baton.kernels import Linear
from baton.models.config import ModelConfig
from baton.models.fingerprint import DUMMY_SEED, DUMMY_STD, weight_files
from baton.node.errors import SettingsError

Progress = Callable[[int, int], None]

LOAD_FORMATS = ("auto", "dummy")
HEAD_NORMS = (".q_norm.weight", ".k_norm.weight")
MAX_TIED_COPY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Linears are [out, in]; Q = num_heads * head_dim, K = num_kv_heads * head_dim."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # [Q + 2 K, hidden]
    qk_norm: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]: the query's for each head, then the key's
    o: Linear  # [hidden, Q]
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole decoder."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: Linear  # [vocab, hidden]; over the embedding itself where the two are tied


def no_progress(done: int, total: int) -> None:
    """The on_progress that tells nobody."""


def load_weights(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    device: str = "cpu",
    load_format: str = "auto",
    on_progress: Progress = no_progress,
    pack: bool = True,
) -> Weights:
    """The folder's weights in `dtype`; `dummy` makes random ones, the same in every process, without reading any.

    pack: prepare them for the CPU's products; without it every weight stays a plain matrix.

    on_progress(done, total) counts tensors. Raises SettingsError for a missing shard or tensor, a file that is cut
    off or no safetensors, and a wrong shape, naming it.
    """
    if load_format not in LOAD_FORMATS:
        raise SettingsError(f"load_format {load_format!r} is unknown; known: {', '.join(LOAD_FORMATS)}")
    weights, places = _allocate(config, dtype, device)
    if load_format == "dummy":
        _fill_randomly(places)
    else:
        _fill_from_shards(folder, places, on_progress)
    if pack:
        _pack(weights)
    return weights


def _fill_from_shards(folder: Path, places: dict[str, torch.Tensor], on_progress: Progress) -> None:
    missing = dict(places)
    for name, tensor in _tensors(folder, places):
        place = missing.pop(name)
        # The norm of queries and keys is one row in the file, and stands once for each head here.
        expected = place.shape[-tensor.dim() :] if name.endswith(HEAD_NORMS) else place.shape
        if tensor.shape != expected or not tensor.is_floating_point():
            found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"floating point {list(expected)}"
            raise SettingsError(f"{folder}: tensor {name} is {found}, expected {wanted}")
        place.copy_(tensor)
        on_progress(len(places) - len(missing), len(places))
    if missing:
        raise SettingsError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} of {len(places)} are)")


def _pack(weights: Weights) -> None:
    """Prepares all products. A large tied head stays as it is: its packed copy would come on top of the embedding."""
    for layer in weights.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            linear.pack()
    tied = weights.lm_head.weight is weights.embedding
    if not tied or weights.embedding.nbytes <= MAX_TIED_COPY_BYTES:
        weights.lm_head.pack(keep_weight=tied)


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

    def linear(prefix: str, parts: dict[str, int], columns: int, with_bias: bool) -> Linear:
        """The projections `parts`, by name with their rows, as one."""
        rows = sum(parts.values())
        made = Linear(empty(rows, columns), empty(rows) if with_bias else None)
        first = 0
        for name, size in parts.items():
            places[f"{prefix}{name}.weight"] = made.weight[first : first + size]
            if made.bias is not None:
                places[f"{prefix}{name}.bias"] = made.bias[first : first + size]
            first += size
        return made

    def head_norms(prefix: str) -> torch.Tensor:
        norms = empty(config.num_heads + config.num_kv_heads, config.head_dim)
        places[f"{prefix}q_norm.weight"] = norms[: config.num_heads]
        places[f"{prefix}k_norm.weight"] = norms[config.num_heads :]
        return norms

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = named("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = []
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        layers.append(
            LayerWeights(
                input_norm=named(f"{layer}input_layernorm.weight", hidden),
                qkv=linear(attention, qkv, hidden, config.qkv_bias),
                qk_norm=head_norms(attention) if config.qk_norm else None,
                o=linear(attention, {"o_proj": hidden}, q_size, config.o_bias),
                post_norm=named(f"{layer}post_attention_layernorm.weight", hidden),
                gate_up=linear(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias),
                down=linear(mlp, {"down_proj": hidden}, inner, config.mlp_bias),
            )
        )
    norm = named("model.norm.weight", hidden)
    if config.tie_word_embeddings:
        return Weights(embedding, tuple(layers), norm, Linear(embedding)), places
    return Weights(embedding, tuple(layers), norm, linear("", {"lm_head": config.vocab_size}, hidden, False)), places


def _fill_randomly(places: dict[str, torch.Tensor]) -> None:
    """Norm weights 1, biases 0, the rest normal: a decoder that computes, though it says nothing.

    A GPU makes its own numbers, in a hundredth of the time: they differ from the CPU's.
    """
    device = next(iter(places.values())).device
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)
    for name, place in places.items():
        if name.endswith("norm.weight"):
            place.fill_(1.0)
        elif name.endswith(".bias"):
            place.zero_()
        elif device.type == "cpu":
            place.copy_(torch.empty(place.shape, dtype=torch.float32).normal_(0.0, DUMMY_STD, generator=generator))
        else:
            place.normal_(0.0, DUMMY_STD, generator=generator)
