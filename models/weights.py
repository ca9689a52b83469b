"""Loads the weights that models.layers describes from safetensors shards. Only safetensors: nothing is unpickled.

Each tensor of a checkpoint has a place: the rows or columns that a rank reads of it, and where they go. Query, key and
value projections are merged into one matrix, gate and up into another: one multiplication instead of three or two.
Tensors are copied shard by shard, so that memory peaks at the rank's part of the model plus one tensor. A head is tied
to the embedding when the config says so, unless the files hold both and they differ: then each is what was saved.

Quantised weights become plain ones on the way: of each, the rank's part of the numbers that its tensors stand for is
computed where it will lie.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from baton.kernels import DenseLinear, Linear
from baton.models.checkpoint import Checkpoint
from baton.models.config import ModelConfig
from baton.models.fingerprint import DUMMY_SEED, DUMMY_STD
from baton.models.layers import WHOLE, AttentionWeights, DenseMlpWeights, LayerWeights, Rank, Weights, describe
from baton.models.quantization.layouts import QuantizedSource
from baton.models.quantization.scheme import Quantization
from baton.models.sources import EMBEDDING, PLAIN, Source, find_sources, has_own_head, log_unused, read_sources
from baton.node.errors import SettingsError
from baton.node.telemetry import log_event

logger = logging.getLogger("weights")

Progress = Callable[[int, int], None]

LOAD_FORMATS = ("auto", "dummy")
GIB = 1 << 30
MAX_TIED_COPY_BYTES = 256 << 20


class WeightCut(NamedTuple):
    """What a rank reads of the rows, or of the columns, of a tensor in a checkpoint."""

    total: int
    part: range

    @classmethod
    def whole(cls, total: int) -> WeightCut:
        return cls(total, range(total))

    @property
    def slice(self) -> slice:
        return slice(self.part.start, self.part.stop)

    def times(self, width: int) -> WeightCut:
        """The same of things that are `width` rows each."""
        return WeightCut(self.total * width, range(self.part.start * width, self.part.stop * width))


class WeightPlace(NamedTuple):
    """Where a tensor of a checkpoint goes."""

    target: torch.Tensor
    """Broadcast to, where it has more dimensions."""
    cuts: tuple[WeightCut, ...]
    """What is read of it, for each of its dimensions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the checkpoint."""
        return tuple(cut.total for cut in self.cuts)

    def fill(self, tensor: torch.Tensor) -> None:
        self.target.copy_(tensor[tuple(cut.slice for cut in self.cuts)])


def no_progress(done: int, total: int) -> None:
    """An on_progress that reports nothing."""


def load_weights(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    device: str = "cpu",
    load_format: str = "auto",
    on_progress: Progress = no_progress,
    pack: bool = True,
    rank: Rank = WHOLE,
) -> Weights:
    """The folder's weights in `dtype`; `dummy` makes random ones, the same in every process, without reading any.

    pack: prepare them for the CPU's products; without it every weight stays as it was loaded.
    rank: whose part of them.

    on_progress(done, total) counts tensors. Raises SettingsError for a missing shard or tensor, a file that is cut
    off or no safetensors, and a wrong shape, naming it.
    """
    if load_format not in LOAD_FORMATS:
        raise SettingsError(f"load_format {load_format!r} is unknown; known: {', '.join(LOAD_FORMATS)}")
    tied = config.tie_word_embeddings
    plan = _plan(config, tied, rank, dtype, device)
    if load_format == "dummy":
        weights, places = _allocate(config, tied, rank, dtype, device)
        _fill_randomly(places)
    else:
        checkpoint = Checkpoint.open(folder)
        sources = find_sources(checkpoint, _shapes(plan), tied, config.quantization)
        if tied and has_own_head(checkpoint, plan[EMBEDDING].shape, config.quantization):
            tied = False
            plan = _plan(config, tied, rank, dtype, device)
            sources = find_sources(checkpoint, _shapes(plan), tied, config.quantization)
        log_unused(checkpoint, sources, tied)
        _log_quantized(folder, sources, config.quantization, dtype)
        weights, places = _allocate(config, tied, rank, dtype, device)
        _fill_from_files(checkpoint, sources, places, on_progress)
    if pack:
        _pack(weights, tied)
    return weights


def _plan(config: ModelConfig, tied: bool, rank: Rank, dtype: torch.dtype, device: str) -> dict[str, WeightPlace]:
    """The places of all weights, without memory behind them. SettingsError if the device could never hold them."""
    _, places = _allocate(config, tied, rank, dtype, "meta")
    needed_bytes = sum(place.target.nbytes for place in places.values())
    if device.startswith("cuda"):
        device_bytes = torch.cuda.mem_get_info(device)[1]
    else:
        device_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > device_bytes:
        raise SettingsError(
            f"weights as config.json describes them take {needed_bytes / GIB:.1f} GiB, and this "
            f"{'GPU' if device.startswith('cuda') else 'host'} has {device_bytes / GIB:.1f} GiB of memory"
        )
    return places


def _shapes(plan: dict[str, WeightPlace]) -> dict[str, tuple[int, ...]]:
    return {name: place.shape for name, place in plan.items()}


def _fill_from_files(
    checkpoint: Checkpoint, sources: dict[str, Source], places: dict[str, WeightPlace], on_progress: Progress
) -> None:
    for done, (name, tensors) in enumerate(read_sources(checkpoint, sources), start=1):
        source, place = sources[name], places[name]
        if isinstance(source, QuantizedSource):
            target = place.target
            weight = source.read({role: tensor.to(target.device) for role, tensor in tensors.items()})
            weight.dequantise(target, *(cut.part for cut in place.cuts))
        else:
            place.fill(tensors[PLAIN])
        on_progress(done, len(places))


def _log_quantized(
    folder: Path, sources: dict[str, Source], quantization: Quantization | None, dtype: torch.dtype
) -> None:
    if quantization is not None:
        log_event(
            logger,
            "weights_quantised",
            folder=folder.name,
            method=quantization.method,
            count=sum(isinstance(source, QuantizedSource) for source in sources.values()),
            plain=sum(not isinstance(source, QuantizedSource) for source in sources.values()),
            served_as=str(dtype).removeprefix("torch."),
        )


def _pack(weights: Weights, tied: bool) -> None:
    """Prepares all products. A large tied head stays as it is: its packed copy would come on top of the embedding."""
    for layer in weights.layers:
        for linear in layer.linears:
            linear.pack()
    if not tied or weights.embedding.nbytes <= MAX_TIED_COPY_BYTES:
        weights.lm_head.pack(keep_weight=tied)


def _allocate(
    config: ModelConfig, tied: bool, rank: Rank, dtype: torch.dtype, device: str
) -> tuple[Weights, dict[str, WeightPlace]]:
    """Uninitialised weights, and by Hugging Face name where each tensor goes."""
    places: dict[str, WeightPlace] = {}
    hidden = WeightCut.whole(config.hidden_size)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def named(name: str, *cuts: WeightCut) -> torch.Tensor:
        places[name] = WeightPlace(empty(*(len(cut.part) for cut in cuts)), cuts)
        return places[name].target

    def linear(prefix: str, outputs: dict[str, WeightCut], inputs: WeightCut, with_bias: bool) -> Linear:
        """The projections of these names as one."""
        rows = sum(len(cut.part) for cut in outputs.values())
        made = DenseLinear(empty(rows, len(inputs.part)), empty(rows) if with_bias else None)
        first = 0
        for name, cut in outputs.items():
            end = first + len(cut.part)
            places[f"{prefix}{name}.weight"] = WeightPlace(made.weight[first:end], (cut, inputs))
            if made.bias is not None:
                places[f"{prefix}{name}.bias"] = WeightPlace(made.bias[first:end], (cut,))
            first = end
        return made

    def head_norms(prefix: str, num_heads: int, num_kv_heads: int) -> torch.Tensor:
        norms, cuts = empty(num_heads + num_kv_heads, config.head_dim), (WeightCut.whole(config.head_dim),)
        places[f"{prefix}q_norm.weight"] = WeightPlace(norms[:num_heads], cuts)
        places[f"{prefix}k_norm.weight"] = WeightPlace(norms[num_heads:], cuts)
        return norms

    query = WeightCut(config.num_heads, rank.share(config.num_heads, "query heads")).times(config.head_dim)
    key = WeightCut(config.num_kv_heads, rank.key_heads(config.num_kv_heads)).times(config.head_dim)
    inner = WeightCut(config.intermediate_size, rank.share(config.intermediate_size, "rows of an MLP"))
    embedding = named(EMBEDDING, WeightCut.whole(config.vocab_size), hidden)
    layers = []
    for index, shape in enumerate(describe(config, rank)):
        layer = f"model.layers.{index}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        of_attention, of_mlp = shape.attention, shape.mlp
        input_norm = named(f"{layer}input_layernorm.weight", hidden)
        qkv = linear(attention, {"q_proj": query, "k_proj": key, "v_proj": key}, hidden, of_attention.qkv_bias)
        heads = of_attention.num_heads, of_attention.num_kv_heads
        norms = head_norms(attention, *heads) if of_attention.head_norms else None
        o = linear(attention, {"o_proj": hidden}, query, of_attention.o_bias)
        post_norm = named(f"{layer}post_attention_layernorm.weight", hidden)
        gate_up = linear(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, of_mlp.gate_bias)
        down = linear(mlp, {"down_proj": hidden}, inner, of_mlp.down_bias)
        parts = AttentionWeights(qkv, norms, o), post_norm, DenseMlpWeights(gate_up, down)
        layers.append(LayerWeights(shape, input_norm, *parts))
    norm = named("model.norm.weight", hidden)
    if tied:
        return Weights(embedding, tuple(layers), norm, DenseLinear(embedding)), places
    head = linear("", {"lm_head": WeightCut.whole(config.vocab_size)}, hidden, False)
    return Weights(embedding, tuple(layers), norm, head), places


def _fill_randomly(places: dict[str, WeightPlace]) -> None:
    """Norm weights 1, biases 0, the rest normal: a decoder that computes, though it says nothing.

    A GPU makes its own numbers, in a hundredth of the time: they differ from the CPU's. Of a tensor that ranks share
    each draws the whole, so that together they have the numbers of one rank.
    """
    device = next(iter(places.values())).target.device
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)
    for name, place in places.items():
        target = place.target
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        elif name.endswith(".bias"):
            target.zero_()
        elif device.type != "cpu" and target.shape == place.shape:
            target.normal_(0.0, DUMMY_STD, generator=generator)  # in place: there is no room for two of the largest
        else:
            dtype = torch.float32 if device.type == "cpu" else target.dtype
            whole = torch.empty(place.shape, dtype=dtype, device=device)
            place.fill(whole.normal_(0.0, DUMMY_STD, generator=generator))
