"""Loads the weights that models.layers describes from safetensors shards. Only safetensors: nothing is unpickled.

Each tensor of a checkpoint has a place: the rows or columns that a rank reads of it, and where they go. Query, key and
value projections are merged into one matrix, gate and up into another: one multiplication instead of three or two.
Tensors are copied shard by shard, so that memory peaks at the rank's part of the model plus one tensor. A head is tied
to the embedding when the config says so, unless the files hold both and they differ: then each is what was saved.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from baton.kernels import DenseLinear, Linear
from baton.models.checkpoint import Checkpoint, StoredTensor
from baton.models.config import ModelConfig
from baton.models.fingerprint import DUMMY_SEED, DUMMY_STD
from baton.models.layers import WHOLE, AttentionWeights, DenseMlpWeights, LayerWeights, Rank, Weights, describe
from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt, log_event

logger = logging.getLogger("weights")

Progress = Callable[[int, int], None]

LOAD_FORMATS = ("auto", "dummy")
GIB = 1 << 30
MAX_TIED_COPY_BYTES = 256 << 20
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNUSED_SUFFIX = ".rotary_emb.inv_freq"  # of old folders: follows from the config


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
        sources = _sources(checkpoint, plan, tied)
        if tied and _has_own_head(checkpoint):
            tied = False
            sources = _sources(checkpoint, _plan(config, tied, rank, dtype, device), tied)
        _log_unused(checkpoint, sources, tied)
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


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether the files hold a head that differs from the embedding: then the config that ties them is wrong."""
    embedding, head = checkpoint.find(EMBEDDING), checkpoint.find(HEAD)
    if embedding is None or head is None or _are_equal(checkpoint, embedding, head):
        return False
    log_event(
        logger,
        "head_not_tied",
        level=logging.WARNING,
        folder=checkpoint.folder.name,
        why="lm_head differs from embedding",
    )
    return True


def _are_equal(checkpoint: Checkpoint, one: StoredTensor, other: StoredTensor) -> bool:
    if checkpoint.forms[one.name] != checkpoint.forms[other.name]:
        return False
    (_, first), (_, second) = next(_tensors(checkpoint, [one])), next(_tensors(checkpoint, [other]))
    return torch.equal(first, second)


def _sources(checkpoint: Checkpoint, places: dict[str, WeightPlace], tied: bool) -> dict[StoredTensor, str]:
    """The stored tensor for each place. SettingsError if one is missing, or its header names another shape or type."""
    names: dict[StoredTensor, str] = {}
    missing = []
    for name in places:
        stored = checkpoint.find(name)
        if stored is None and tied and name == EMBEDDING:
            stored = checkpoint.find(HEAD)  # of two tensors in one memory safetensors may save either
        if stored is None:
            missing.append(name)
        else:
            names[stored] = name
    if missing:
        raise SettingsError(
            f"{checkpoint.folder}: tensor {min(missing)} is missing ({len(missing)} of {len(places)} are)"
        )
    for stored, name in names.items():
        form, shape = checkpoint.forms[stored.name], places[name].shape
        if form.shape != shape or not form.is_floating_point:
            found, wanted = f"{form.dtype} {list(form.shape)}", f"floating point {list(shape)}"
            raise SettingsError(f"{checkpoint.folder}: tensor {stored.name} is {found}, expected {wanted}")
    return names


def _fill_from_files(
    checkpoint: Checkpoint, sources: dict[StoredTensor, str], places: dict[str, WeightPlace], on_progress: Progress
) -> None:
    for done, (stored, tensor) in enumerate(_tensors(checkpoint, sources), start=1):
        places[sources[stored]].fill(tensor)
        on_progress(done, len(places))


def _log_unused(checkpoint: Checkpoint, used: Collection[StoredTensor], tied: bool) -> None:
    """Tensors that the model of this config has no place for are left out, as transformers does."""
    unused = checkpoint.holders.keys() - {stored.name for stored in used}
    head = checkpoint.find(HEAD) if tied else None
    unused = {name for name in unused if not name.endswith(UNUSED_SUFFIX) and (head is None or name != head.name)}
    if unused:
        log_event(
            logger,
            "tensors_unused",
            level=logging.WARNING,
            folder=checkpoint.folder.name,
            count=len(unused),
            first=min(unused),
        )


def _pack(weights: Weights, tied: bool) -> None:
    """Prepares all products. A large tied head stays as it is: its packed copy would come on top of the embedding."""
    for layer in weights.layers:
        for linear in layer.linears:
            linear.pack()
    if not tied or weights.embedding.nbytes <= MAX_TIED_COPY_BYTES:
        weights.lm_head.pack(keep_weight=tied)


def _tensors(checkpoint: Checkpoint, wanted: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """The wanted tensors, file by file."""
    for file_name, stored_in_file in groupby(sorted(wanted, key=attrgetter("file", "name")), attrgetter("file")):
        path = checkpoint.folder / file_name
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for stored in stored_in_file:
                    yield stored, file.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"{path}: not a whole safetensors file: {excerpt(error)}") from None


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
