"""Loads the weights that models.layers describes from safetensors shards. Only safetensors: nothing is unpickled.

Each tensor of a checkpoint has a place: the rows or columns that a rank reads of it, and where they go. Query, key and
value projections are merged into one matrix, gate and up into another: one multiplication instead of three or two.
Tensors are copied shard by shard, so that memory peaks at the rank's part of the model plus one tensor. A head is tied
to the embedding when the config says so, unless the files hold both and they differ: then each is what was saved.

Quantised weights become plain ones on the way, the rank's part of the numbers that their tensors stand for; or, where
they are to be kept, they lie on the device as codes and scales, as far as models.quantization.kept finds a layout.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from baton.kernels import DenseLinear, GroupedLinear, Linear
from baton.models.checkpoint import Checkpoint
from baton.models.config import ModelConfig
from baton.models.fingerprint import DUMMY_SEED, DUMMY_STD
from baton.models.layers import WHOLE, AttentionWeights, DenseMlpWeights, LayerWeights, Rank, Weights, describe
from baton.models.places import PlainPlace, WeightCut, WeightPlace
from baton.models.quantization.kept import Part, keep_quantised
from baton.models.quantization.layouts import QuantizedSource
from baton.models.quantization.weight import QuantizedWeight
from baton.models.sources import (
    EMBEDDING,
    PLAIN,
    Source,
    find_sources,
    has_own_head,
    log_unused,
    read_forms,
    read_sources,
)
from baton.node.errors import SettingsError
from baton.node.telemetry import log_event

logger = logging.getLogger("weights")

Progress = Callable[[int, int], None]

LOAD_FORMATS = ("auto", "dummy")
GIB = 1 << 30
MAX_TIED_COPY_BYTES = 256 << 20


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
    keep_quantised: bool = False,
) -> Weights:
    """The folder's weights in `dtype`; `dummy` makes random ones, the same in every process, without reading any.

    pack: prepare them for the CPU's products; without it every weight stays as it was loaded.
    rank: whose part of them.
    keep_quantised: leave quantised weights so where a layout of baton.kernels.linear takes them.

    on_progress(done, total) counts tensors. Raises SettingsError for a missing shard or tensor, a file that is cut
    off or no safetensors, and a wrong shape, naming it.
    """
    if load_format not in LOAD_FORMATS:
        raise SettingsError(f"load_format {load_format!r} is unknown; known: {', '.join(LOAD_FORMATS)}")
    tied = config.tie_word_embeddings
    if load_format == "dummy":
        _check_room(config, tied, rank, dtype, device)
        weights, places = _allocate(config, tied, rank, dtype, device)
        _fill_randomly(places)
    else:
        checkpoint = Checkpoint.open(folder)
        shapes = _shapes(config, tied, rank)
        sources = find_sources(checkpoint, shapes, tied, config.quantization)
        if tied and has_own_head(checkpoint, shapes[EMBEDDING], config.quantization):
            tied = False
            sources = find_sources(checkpoint, _shapes(config, tied, rank), tied, config.quantization)
        log_unused(checkpoint, sources, tied)
        forms = read_forms(checkpoint, sources) if keep_quantised else {}
        _check_room(config, tied, rank, dtype, device, forms)
        weights, places = _allocate(config, tied, rank, dtype, device, forms)
        _fill_from_files(checkpoint, sources, places, on_progress)
        for linear in weights.linears:
            if isinstance(linear, GroupedLinear):
                linear.finish()
        if config.quantization is not None:
            _log_quantized(folder, sources, config.quantization.method, weights)
    if pack:
        _pack(weights, tied)
    return weights


def _shapes(config: ModelConfig, tied: bool, rank: Rank) -> dict[str, tuple[int, ...]]:
    """Of all weights, before they are cut."""
    _, places = _allocate(config, tied, rank, torch.bfloat16, "meta")
    return {name: place.shape for name, place in places.items()}


def _check_room(
    config: ModelConfig,
    tied: bool,
    rank: Rank,
    dtype: torch.dtype,
    device: str,
    forms: Mapping[str, QuantizedWeight] = MappingProxyType({}),
) -> None:
    """SettingsError if the device could never hold the weights."""
    _, places = _allocate(config, tied, rank, dtype, "meta", forms)
    needed_bytes = sum(place.size_bytes for place in places.values())
    if device.startswith("cuda"):
        device_bytes = torch.cuda.mem_get_info(device)[1]
    else:
        device_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > device_bytes:
        raise SettingsError(
            f"weights as config.json describes them take {needed_bytes / GIB:.1f} GiB, and this "
            f"{'GPU' if device.startswith('cuda') else 'host'} has {device_bytes / GIB:.1f} GiB of memory"
        )


def _fill_from_files(
    checkpoint: Checkpoint, sources: dict[str, Source], places: dict[str, WeightPlace], on_progress: Progress
) -> None:
    for done, (name, tensors) in enumerate(read_sources(checkpoint, sources), start=1):
        source, place = sources[name], places[name]
        if isinstance(source, QuantizedSource):
            place.fill(source.read({role: tensor.to(place.device) for role, tensor in tensors.items()}))
        else:
            place.fill(tensors[PLAIN])
        on_progress(done, len(places))


def _log_quantized(folder: Path, sources: dict[str, Source], method: str, weights: Weights) -> None:
    formats = Counter(linear.weight_format for linear in weights.linears)
    log_event(
        logger,
        "weights_quantised",
        folder=folder.name,
        method=method,
        count=sum(isinstance(source, QuantizedSource) for source in sources.values()),
        plain=sum(not isinstance(source, QuantizedSource) for source in sources.values()),
        products=",".join(f"{name}:{count}" for name, count in sorted(formats.items())),
        activations=str(weights.embedding.dtype).removeprefix("torch."),
    )


def _pack(weights: Weights, tied: bool) -> None:
    """Prepares all products. A large tied head stays as it is: its packed copy would come on top of the embedding."""
    for layer in weights.layers:
        for linear in layer.linears:
            linear.pack()
    if not tied or weights.embedding.nbytes <= MAX_TIED_COPY_BYTES:
        weights.lm_head.pack(keep_weight=tied)


def _allocate(
    config: ModelConfig,
    tied: bool,
    rank: Rank,
    dtype: torch.dtype,
    device: str,
    forms: Mapping[str, QuantizedWeight] = MappingProxyType({}),
) -> tuple[Weights, dict[str, WeightPlace]]:
    """Uninitialised weights, and by Hugging Face name where each tensor goes; `forms`: of weights to be kept so."""
    places: dict[str, WeightPlace] = {}
    hidden = WeightCut.whole(config.hidden_size)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def named(name: str, *cuts: WeightCut) -> torch.Tensor:
        place = PlainPlace(empty(*(len(cut.part) for cut in cuts)), cuts)
        places[name] = place
        return place.target

    def linear(prefix: str, outputs: dict[str, WeightCut], inputs: WeightCut, with_bias: bool) -> Linear:
        """The projections of these names as one."""
        rows = sum(len(cut.part) for cut in outputs.values())
        bias = empty(rows) if with_bias else None
        names = [f"{prefix}{name}.weight" for name in outputs]
        kept = None
        if all(name in forms for name in names):
            parts = [Part(forms[name], cut) for name, cut in zip(names, outputs.values(), strict=True)]
            kept = keep_quantised(parts, inputs, bias, device)
        made: Linear
        if kept is not None:
            made = kept[0]
            places.update(zip(names, kept[1], strict=True))
        else:
            made = DenseLinear(empty(rows, len(inputs.part)), bias)
        first = 0
        for name, cut in outputs.items():
            end = first + len(cut.part)
            if isinstance(made, DenseLinear):
                places[f"{prefix}{name}.weight"] = PlainPlace(made.weight[first:end], (cut, inputs))
            if bias is not None:
                places[f"{prefix}{name}.bias"] = PlainPlace(bias[first:end], (cut,))
            first = end
        return made

    def head_norms(prefix: str, num_heads: int, num_kv_heads: int) -> torch.Tensor:
        norms, cuts = empty(num_heads + num_kv_heads, config.head_dim), (WeightCut.whole(config.head_dim),)
        places[f"{prefix}q_norm.weight"] = PlainPlace(norms[:num_heads], cuts)
        places[f"{prefix}k_norm.weight"] = PlainPlace(norms[num_heads:], cuts)
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
    device = next(iter(places.values())).device
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)
    for name, place in places.items():
        assert isinstance(place, PlainPlace), "random weights are plain"
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
