"""Loads the weights that models.layers describes from safetensors shards. Only safetensors: nothing is unpickled.

Each tensor of a checkpoint has a place (`allocation`), to which the part is copied that a rank reads of it. Tensors are
read shard by shard, so that memory peaks at the rank's part of the model plus one tensor. A head is tied to the
embedding when the config says so, unless the files hold both and they differ: then each is what was saved.

Quantised weights become plain ones on the way, the rank's part of the numbers that their tensors stand for; or, where
they are to be kept, they lie on the device as codes and scales, as far as models.quantization.kept finds a layout.
Plain weights may be quantised by a recipe on the way.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from baton.kernels import GroupedLinear
from baton.kernels.routing import expected_experts
from baton.models.allocation import allocate
from baton.models.checkpoint import Checkpoint
from baton.models.config import ModelConfig
from baton.models.layer_weights import ExpertsWeights, Weights
from baton.models.layers import ExpertsMlp
from baton.models.partition import ONLY_STAGE, WHOLE, Rank, Stage
from baton.models.places import GroupedPlace, JoinedPlaces, PlainPlace, ScaledPlace, WeightPlace
from baton.models.quantization.layouts import CODES, QuantizedSource
from baton.models.quantization.recipe import Recipe
from baton.models.quantization.rounding import form_of, quantise
from baton.models.quantization.weight import QuantizedWeight
from baton.models.random_weights import fill_randomly
from baton.models.sources import (
    EMBEDDING,
    EXPERTS,
    HEAD,
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
ENDS = (EMBEDDING.removeprefix("model."), "model.norm.weight", HEAD)
"""What the first or the last stage of a pipeline has, and the others have not."""
PROJECTIONS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
"""Ends of the names of weights that recipes quantise: neither embedding and head nor routers."""


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
    recipe: Recipe | None = None,
    keep_quantised: bool = False,
    stage: Stage = ONLY_STAGE,
) -> Weights:
    """The folder's weights in `dtype`; `dummy` makes random ones, the same in every process, without reading any.

    pack: prepare them for the CPU's products; without it every weight stays as it was loaded.
    rank, stage: whose part of them.
    recipe: quantise the projections of a folder of plain weights so; None: they are as the folder has them.
    keep_quantised: leave quantised weights so where a layout of baton.kernels.linear takes them.

    on_progress(done, total) counts tensors. Raises SettingsError for a missing shard or tensor, a file that is cut
    off or no safetensors, and a wrong shape, naming it.
    """
    if load_format not in LOAD_FORMATS:
        raise SettingsError(f"load_format {load_format!r} is unknown; known: {', '.join(LOAD_FORMATS)}")
    tied = config.tie_word_embeddings
    shapes = _shapes(config, tied, rank, stage)
    if load_format == "dummy":
        recipe = recipe or (config.quantization.recipe if config.quantization is not None else None)
        weights, places = _with_room(config, tied, rank, dtype, device, _forms(recipe, shapes, keep_quantised), stage)
        recipes = _recipes(recipe, shapes)
        fill_randomly(places, recipes)
        quantised = len(recipes)
    else:
        checkpoint = Checkpoint.open(folder)
        sources = find_sources(checkpoint, shapes, tied, config.quantization)
        if tied and EMBEDDING in shapes and has_own_head(checkpoint, shapes[EMBEDDING], config.quantization):
            tied = False
            shapes = _shapes(config, tied, rank, stage)
            sources = find_sources(checkpoint, shapes, tied, config.quantization)
        log_unused(checkpoint, sources, tied, _left_out(config, rank, stage))
        forms = read_forms(checkpoint, sources) if keep_quantised else {}
        forms |= _forms(recipe, shapes, keep_quantised)
        weights, places = _with_room(config, tied, rank, dtype, device, forms, stage)
        recipes = _recipes(recipe, shapes)
        _fill_from_files(checkpoint, sources, places, recipes, on_progress)
        quantised = len(recipes) + sum(isinstance(source, QuantizedSource) for source in sources.values())
    for linear in weights.linears:
        if isinstance(linear, GroupedLinear):
            linear.finish()
    if config.quantization is not None:
        _log_quantised(folder, config.quantization.method, quantised, len(places) - quantised, weights)
    elif recipe is not None:
        _log_quantised(folder, f"{recipe.kind}, at load", quantised, len(places) - quantised, weights)
    _log_experts(weights)
    if pack:
        _pack(weights, tied, stage)
    return weights


def _left_out(config: ModelConfig, rank: Rank, stage: Stage) -> tuple[str, ...]:
    """Parts of the names of tensors that have no place here."""
    own, last = stage.layers(config.num_layers), config.num_layers + config.num_draft_layers
    elsewhere = [f"layers.{layer}." for layer in range(last) if layer not in own]
    ends = ENDS if stage.count > 1 else ()
    return (*elsewhere, *ends, *((EXPERTS,) if rank.count > 1 else ()))


def _shapes(config: ModelConfig, tied: bool, rank: Rank, stage: Stage) -> dict[str, tuple[int, ...]]:
    """Of all weights, before they are cut."""
    _, places = allocate(config, tied, rank, torch.bfloat16, "meta", {}, stage)
    return {name: place.shape for name, place in places.items()}


def _recipes(recipe: Recipe | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Recipe]:
    """By the names of the weights that it quantises."""
    return {} if recipe is None else {name: recipe for name in shapes if name.endswith(PROJECTIONS)}


def _forms(recipe: Recipe | None, shapes: Mapping[str, tuple[int, ...]], keep: bool) -> dict[str, QuantizedWeight]:
    """What the recipe makes of weights that stay quantised."""
    recipes = _recipes(recipe, shapes) if keep else {}
    return {name: form_of(each, shapes[name][0], shapes[name][1]) for name, each in recipes.items()}


def _with_room(
    config: ModelConfig,
    tied: bool,
    rank: Rank,
    dtype: torch.dtype,
    device: str,
    forms: Mapping[str, QuantizedWeight],
    stage: Stage,
) -> tuple[Weights, dict[str, WeightPlace]]:
    """As `allocate`. SettingsError if the device could never hold the weights."""
    _, places = allocate(config, tied, rank, dtype, "meta", forms, stage)
    needed_bytes = sum(place.size_bytes for place in places.values())
    if device.startswith("cuda"):
        device_bytes = torch.cuda.mem_get_info(device)[1]
    else:
        device_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        needed_bytes *= rank.count  # all ranks are on this host; a GPU has one
    if needed_bytes > device_bytes:
        raise SettingsError(
            f"weights as config.json describes them take {needed_bytes / GIB:.1f} GiB, and this "
            f"{'GPU' if device.startswith('cuda') else 'host'} has {device_bytes / GIB:.1f} GiB of memory"
        )
    return allocate(config, tied, rank, dtype, device, forms, stage)


def _fill_from_files(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    places: Mapping[str, WeightPlace],
    recipes: Mapping[str, Recipe],
    on_progress: Progress,
) -> None:
    for done, (name, tensors) in enumerate(read_sources(checkpoint, sources), start=1):
        source, place = sources[name], places[name]
        if isinstance(source, QuantizedSource):
            _fill_quantised(source, source.form(checkpoint), tensors, place)
        elif name in recipes:
            place.fill(_quantised(tensors[PLAIN], recipes[name], place.device, checkpoint.folder / name))
        else:
            place.fill(tensors[PLAIN])
        on_progress(done, len(places))


def _fill_quantised(
    source: QuantizedSource, form: QuantizedWeight, tensors: Mapping[str, torch.Tensor], place: WeightPlace
) -> None:
    """Brings to the device, and unpacks, what the place needs, as far as the layout can be cut."""
    parts = place.places if isinstance(place, JoinedPlaces) and source.layout.axes else (place,)
    for part in parts:
        if isinstance(part, PlainPlace | ScaledPlace | GroupedPlace) and source.layout.axes:
            rows, columns = (cut.part for cut in part.cuts)
            of_part, window, needed = source.cut(tensors, form, rows, columns)
            part.within(*window).fill(of_part.read(_moved(needed, part)))
        else:
            part.fill(source.read(_moved(tensors, part)))


def _moved(tensors: Mapping[str, torch.Tensor], place: WeightPlace) -> dict[str, torch.Tensor]:
    """The tensors of a quantised weight on the place's device. Codes that a place takes a part of as they are stay in
    the file's pages, of which no more is read than that part."""
    parts = place.places if isinstance(place, JoinedPlaces) else (place,)
    stays = CODES if all(isinstance(part, ScaledPlace) for part in parts) else None
    return {role: tensor if role == stays else tensor.to(place.device) for role, tensor in tensors.items()}


def _quantised(tensor: torch.Tensor, recipe: Recipe, device: torch.device, where: Path) -> QuantizedWeight:
    def rows(part: range) -> torch.Tensor:
        return tensor[part.start : part.stop].to(device)

    outputs, inputs = tensor.shape
    made = quantise(recipe, outputs, inputs, str(device), rows)
    if not bool(made.scales.isfinite().all()):
        raise SettingsError(f"{where}: has values that are infinite or no numbers, which cannot be quantised")
    return made


def _log_quantised(folder: Path, method: str, count: int, plain: int, weights: Weights) -> None:
    formats = Counter(linear.weight_format for linear in weights.linears)
    log_event(
        logger,
        "weights_quantised",
        folder=folder.name,
        method=method,
        count=count,
        plain=plain,
        products=",".join(f"{name}:{number}" for name, number in sorted(formats.items())),
        activations=str(weights.embedding.dtype).removeprefix("torch."),
    )


def _log_experts(weights: Weights) -> None:
    """What a layer's experts take, and what steps of few tokens read of them."""
    layers = [(layer.shape.mlp, layer.mlp) for layer in weights.layers if isinstance(layer.mlp, ExpertsWeights)]
    if not layers:
        return
    shape, mlp = layers[0]
    assert isinstance(shape, ExpertsMlp), "the weights are of this shape"
    held_bytes = sum(mlp.gate_up.size_bytes + mlp.down.size_bytes for _, mlp in layers)
    routing = shape.routing
    read_gib = [
        round(held_bytes * expected_experts(number, routing) / routing.num_experts / GIB, 3) for number in (1, 8, 64)
    ]
    log_event(
        logger,
        "experts",
        layers=len(layers),
        experts=len(shape.experts),
        top_k=routing.top_k,
        format=mlp.gate_up.weight_format,
        gib=round(held_bytes / GIB, 3),
        read_gib_1_token=read_gib[0],
        read_gib_8_tokens=read_gib[1],
        read_gib_64_tokens=read_gib[2],
    )


def _pack(weights: Weights, tied: bool, stage: Stage) -> None:
    """Prepares all products. A large tied head stays as it is: its packed copy would come on top of the embedding."""
    for layer in weights.layers:
        for linear in layer.linears:
            linear.pack()
    if stage.is_last and (not tied or weights.embedding.nbytes <= MAX_TIED_COPY_BYTES):
        weights.lm_head.pack(keep_weight=tied)
