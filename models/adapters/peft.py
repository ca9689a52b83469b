"""Reads an adapter from a folder of PEFT, for one model. Every tensor of it is used, or the adapter is refused by name;
only pairs of what sees images are left out, which text does not pass.

The tensors say which modules are adapted; the configuration says only how they are scaled. The bytes are read once:
what the digest covers is what is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from baton.models.adapters.adapter import (
    AdaptedProduct,
    Adapter,
    LayerAdapter,
    LowRank,
    Parts,
)
from baton.models.adapters.base_rows import BaseRows, unknown_rows
from baton.models.adapters.expert_modules import (
    ExpertPlace,
    ParameterPlace,
    expert_modules,
    expert_parameters,
    joined,
    parts_of_parameter,
)
from baton.models.adapters.modules import (
    EMBEDDING,
    LM_HEAD,
    PREFIX,
    Place,
    ProductPlace,
    adapted_modules,
    is_of_images,
    name_in_decoder,
    norm_numbers,
    optional_modules,
    reason_not_adapted,
)
from baton.models.adapters.tensors import checked, read_tensors
from baton.models.adapters.token_rows import take_token_rows
from baton.models.config import ModelConfig
from baton.node.adapter_folder import AdapterConfig, read_adapter_config, weights_file
from baton.node.errors import AdapterError
from baton.node.telemetry import excerpt, log_event

PairPlace: TypeAlias = "Place | ExpertPlace | ParameterPlace"
FORMS = {  # what a tensor's name ends in: the side of the pair
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
FIRST_ROWS = 64
"""Of a copy of the model's embedding or head that an adapter holds, rows that are compared before all are."""

logger = logging.getLogger("adapters")


def read_adapter(folder: Path, config: ModelConfig, base_rows: BaseRows = unknown_rows) -> Adapter:
    """Raises AdapterError, which names the tensor or the field."""
    adapter_config = read_adapter_config(folder)
    found, weights_digest = read_tensors(weights_file(folder))
    tensors = {name: tensor for name, tensor in found.items() if not is_of_images(name)}
    if len(tensors) < len(found):
        num_left_out = len(found) - len(tensors)
        log_event(logger, "adapter_tensors_of_images_left_out", folder=folder.name, tensors=num_left_out)
    places = adapted_modules(config)
    wholes = _take_wholes(tensors, places, base_rows)
    norms = _take_norms(tensors, config)
    token_rows = take_token_rows(tensors, config, dict(adapter_config.tokens), base_rows)
    wrappers = expert_parameters(config)
    pair_places: dict[str, PairPlace] = {**places, **optional_modules(config), **expert_modules(config)}
    pairs, names = _pairs(tensors, pair_places.keys() | wrappers.keys(), config)
    _name_parameters(pairs, names, wrappers, pair_places)
    if both := sorted(wholes.keys() & pairs.keys()):
        raise AdapterError(f"module {both[0]}: has a low-rank pair beside a whole weight that is not the model's own")
    if both := sorted(token_rows.keys() & (wholes.keys() | pairs.keys())):
        raise AdapterError(f"module {both[0]}: has a low-rank pair or a whole weight beside rows of tokens")
    if not pairs and not wholes and not norms and not token_rows:
        raise AdapterError("the weights hold no pair of lora_A and lora_B of the decoder")
    assembler = _Assembler(config, adapter_config, pair_places, base_rows)
    adapter = assembler.adapter(pairs, names, adapter_config.digest(weights_digest))
    return replace(
        adapter,
        embedding=token_rows.get(EMBEDDING, adapter.embedding),
        lm_head=(token_rows[LM_HEAD],) if LM_HEAD in token_rows else adapter.lm_head,
        whole_embedding=wholes.get(EMBEDDING),
        whole_head=wholes.get(LM_HEAD),
        norms=norms,
    )


def _take_wholes(
    tensors: dict[str, torch.Tensor], places: Mapping[str, Place], base_rows: BaseRows
) -> dict[str, torch.Tensor]:
    """The embedding and the head that an adapter brings in place of the model's (modules_to_save), by module, taken out
    of the tensors. PEFT also saves the model's own, beside pairs that change them."""
    found = {}
    for name in sorted(tensors):
        short = name_in_decoder(name)
        module = short.removesuffix(".weight").removesuffix(".base_layer")
        if not short.endswith(".weight") or module not in (EMBEDDING, LM_HEAD):
            continue
        place, tensor = places[module], checked(name, tensors.pop(name), 2)
        assert isinstance(place, AdaptedProduct), "of the vocabulary"
        shape = [place.num_outputs, place.num_inputs]
        if list(tensor.shape) != shape:
            raise AdapterError(
                f"tensor {excerpt(name)}: is {list(tensor.shape)}, the model's own {shape}: an adapter cannot change "
                "the size of the vocabulary"
            )
        is_own = _is_own(tensor, f"{module}.weight", base_rows)
        if short.endswith(".base_layer.weight"):
            if is_own is False:  # of a tied model, both uses would change
                raise AdapterError(f"tensor {excerpt(name)}: differs from the model's own, which it should be")
        elif not is_own:
            if module in found:
                raise AdapterError(f"tensor {excerpt(name)}: is there twice, under two names")
            found[module] = tensor
    return found


def _take_norms(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[int, torch.Tensor]:
    """The norms that an adapter brings in place of the model's (modules_to_save), taken out of the tensors."""
    numbers, found = norm_numbers(config), {}
    for name in sorted(tensors):
        number = numbers.get(name_in_decoder(name).removesuffix(".weight"))
        if number is not None:
            tensor = checked(name, tensors.pop(name), 1)
            if len(tensor) != config.hidden_size or number in found:
                raise AdapterError(f"tensor {excerpt(name)}: is there twice, or not {[config.hidden_size]}")
            found[number] = tensor
    return found


def _is_own(tensor: torch.Tensor, name: str, base_rows: BaseRows) -> bool | None:
    """Whether it is the model's weight of that name; None: that is not known."""
    count = min(FIRST_ROWS, len(tensor))
    rows = sorted({number * (len(tensor) - 1) // max(1, count - 1) for number in range(count)})
    for numbers in (rows, None):
        own = base_rows(name, numbers)
        if own is None:
            return None
        if not torch.equal((tensor if numbers is None else tensor[numbers]).to(own.dtype), own):
            return False
    return True


def _pairs(
    tensors: Mapping[str, torch.Tensor], modules: Set[str], config: ModelConfig
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """By module, both tensors of its pair, and its name in the model that was trained."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    names = {}
    for name, tensor in sorted(tensors.items()):
        short = name_in_decoder(name)
        ending = next((ending for ending in FORMS if short.endswith(ending)), None)
        if ending is None:
            raise AdapterError(f"tensor {excerpt(name)}: is {_kind(short)}, which is not supported")
        module = short.removesuffix(ending)
        if module not in modules:
            raise AdapterError(f"tensor {excerpt(name)}: {reason_not_adapted(module, config)}")
        if ending.startswith(".lora_embedding") != (module == EMBEDDING):
            raise AdapterError(f"tensor {excerpt(name)}: is not what PEFT saves of this module")
        pair = pairs.setdefault(module, {})
        if FORMS[ending] in pair:
            raise AdapterError(f"tensor {excerpt(name)}: is there twice, under two names")
        pair[FORMS[ending]] = checked(name, tensor, 1 if FORMS[ending] == "magnitude" else 2)
        names[module] = name.removeprefix(PREFIX).removesuffix(ending)
    return pairs, names


def _name_parameters(
    pairs: dict[str, dict[str, torch.Tensor]],
    names: dict[str, str],
    wrappers: Mapping[str, Mapping[str, ParameterPlace]],
    places: dict[str, PairPlace],
) -> None:
    """Gives pairs of experts' parameters a place, and the names of these instead of their wrappers', by the shapes."""
    for wrapper in sorted(pairs.keys() & wrappers.keys()):
        pair = pairs.pop(wrapper)
        _check_whole(wrapper, pair)
        ends = pair["a"].shape[1], pair["b"].shape[0]
        of = {name: (place.shape.num_inputs, place.shape.num_outputs) for name, place in wrappers[wrapper].items()}
        found = next((name for name, known in of.items() if known == ends), None)
        if found is None or found in pairs:
            raise AdapterError(
                f"module {wrapper}: a pair from {ends[0]} inputs to {ends[1]} outputs is there twice, or fits no "
                f"parameter: {of}"
            )
        pairs[found], places[found] = pair, wrappers[wrapper][found]
        names[found] = names.pop(wrapper).removesuffix(".base_layer") + "." + found.rpartition(".")[2]


def _check_whole(module: str, pair: Mapping[str, torch.Tensor]) -> None:
    for side, other in (("a", "lora_B"), ("b", "lora_A")):
        if side not in pair:
            raise AdapterError(f"module {module}: has a {other} without a lora_{side.upper()}")


def _kind(name: str) -> str:
    """What PEFT saves under such a name."""
    if name.endswith(".lora_B.bias"):
        return "a bias of lora_B"
    if name.endswith((".weight", ".bias")):
        return "a whole weight (modules_to_save) of neither the embedding, the head nor a norm that can be replaced"
    return "no part of a low-rank adapter"


class _Assembler:
    """Puts the pairs of an adapter in their places, scaled."""

    def __init__(
        self, config: ModelConfig, adapter_config: AdapterConfig, places: Mapping[str, PairPlace], base_rows: BaseRows
    ) -> None:
        self._config, self._adapter_config = config, adapter_config
        self._places, self._base_rows = places, base_rows
        self._ranks: dict[str, int] = {}
        self._scalings: dict[str, float] = {}

    def adapter(
        self, pairs: Mapping[str, Mapping[str, torch.Tensor]], names: Mapping[str, str], digest: bytes
    ) -> Adapter:
        """pairs: by module; names: of these modules in the model that was trained."""
        layers: list[dict[str, Parts]] = [{} for _ in range(self._config.num_layers)]
        embedding: LowRank | None = None
        lm_head: Parts = ()
        experts = _ExpertParts(layers)
        self._ranks = self._adapter_config.ranks_of(names)
        self._scalings = self._adapter_config.scalings_of(names, self._ranks)
        for module, pair in pairs.items():
            place = self._places[module]
            if isinstance(place, ExpertPlace):
                experts.add(module, place, self._scaled(module, pair, place.shape))
            elif isinstance(place, ParameterPlace):
                experts.add_all(module, place, self._scaled(module, pair, place.shape, place.num_experts))
            elif isinstance(place, ProductPlace):
                parts = list(layers[place.layer].get(place.product, (None,) * place.num_parts))
                own = slice(place.first_part, place.first_part + len(place.shape.outputs))
                if any(parts[own]):
                    raise AdapterError(f"module {module}: is there twice, under two names")
                parts[own] = _cut(self._scaled(module, pair, place.shape), place.shape)
                layers[place.layer][place.product] = tuple(parts)
            elif module == LM_HEAD:
                lm_head = (self._scaled(module, pair, place),)
            else:
                embedding = self._scaled(module, pair, AdaptedProduct(place.num_outputs, (place.num_inputs,)))
        if self._config.experts is not None:
            experts.join(self._config.experts.num_experts)
        return Adapter(digest, tuple(LayerAdapter(**layer) for layer in layers), embedding, lm_head)

    def _scaled(
        self, module: str, pair: Mapping[str, torch.Tensor], shape: AdaptedProduct, num_experts: int = 1
    ) -> LowRank:
        """The pair with the scaling in b, float32. num_experts: whose pairs are in it."""
        _check_whole(module, pair)
        a, b, rank = pair["a"], pair["b"], num_experts * self._ranks[module]
        if a.shape != (rank, shape.num_inputs) or b.shape != (shape.num_outputs, rank):
            raise AdapterError(
                f"module {module}: lora_A {list(a.shape)} and lora_B {list(b.shape)}, by the model and the "
                f"configuration [{rank}, {shape.num_inputs}] and [{shape.num_outputs}, {rank}]"
            )
        scaled = LowRank(a, b.float() * self._scalings[module])
        if ("magnitude" in pair) != self._adapter_config.has_magnitudes:
            raise AdapterError(f"module {module}: has a magnitude, or has none, other than 'use_dora' says")
        return self._with_magnitude(module, scaled, pair["magnitude"]) if "magnitude" in pair else scaled

    def _with_magnitude(self, module: str, pair: LowRank, magnitude: torch.Tensor) -> LowRank:
        """Each row of W + b a gets the length that the magnitude says; arXiv:2402.09353."""
        if not isinstance(self._places[module], ProductPlace) and module != LM_HEAD:
            raise AdapterError(f"module {module}: DoRA of embeddings and routed experts is not supported")
        weight = self._base_rows(f"{module}.weight", None)
        if weight is None or magnitude.shape != pair.b.shape[:1]:
            raise AdapterError(f"module {module}: DoRA needs the model's plain weight, with a magnitude for each row")
        lengths = torch.linalg.vector_norm(weight.float() + pair.b @ pair.a.float(), dim=1)
        row_scale = magnitude.float() / lengths
        if not torch.isfinite(row_scale).all():
            raise AdapterError(f"module {module}: a row of the changed weight is zero")
        return LowRank(pair.a, pair.b * row_scale[:, None], row_scale)


class _ExpertParts:
    """Gathers the pairs of routed experts in the products of layers, each of which one form of pairs may change."""

    def __init__(self, layers: list[dict[str, Parts]]) -> None:
        self._layers = layers
        self._single: dict[tuple[int, str], tuple[dict[int, LowRank], ...]] = {}

    def add(self, module: str, place: ExpertPlace, pair: LowRank) -> None:
        self._check_new(module, place)
        num_parts = 2 if place.product == "expert_gate_up" else 1
        parts = self._single.setdefault((place.layer, place.product), tuple({} for _ in range(num_parts)))
        parts[place.part][place.expert] = pair

    def add_all(self, module: str, place: ParameterPlace, pair: LowRank) -> None:
        self._check_new(module, place)
        self._layers[place.layer][place.product] = parts_of_parameter(pair.a, pair.b, place)

    def join(self, num_experts: int) -> None:
        """After the last pair."""
        for (layer, product), parts in self._single.items():
            self._layers[layer][product] = tuple(joined(part, num_experts) if part else None for part in parts)

    def _check_new(self, module: str, place: ExpertPlace | ParameterPlace) -> None:
        of_all = place.product in self._layers[place.layer]
        of_one = isinstance(place, ParameterPlace) and (place.layer, place.product) in self._single
        if of_all or of_one:
            raise AdapterError(f"module {module}: experts have pairs of their own beside one for all of them")


def _cut(pair: LowRank, shape: AdaptedProduct) -> list[LowRank | None]:
    sizes = list(shape.outputs)
    scales = [None] * len(sizes) if pair.row_scale is None else pair.row_scale.split(sizes)
    return [LowRank(pair.a, rows, scale) for rows, scale in zip(pair.b.split(sizes), scales, strict=True)]
