"""Plain weights to QuantizedWeights by a recipe, a part of the rows at a time. What it rounds does not depend on the
device or on the parts: a scale's weights are in one part, and each operation is exact or rounds once, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from baton.models.quantization.recipe import Recipe
from baton.models.quantization.weight import QuantizedWeight

PART_ELEMENTS = 1 << 22
ORDER_SEED = 0
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}

Rows = Callable[[range], torch.Tensor]
"""rows(part) -> [len(part), K]"""


def form_of(recipe: Recipe, outputs: int, inputs: int, device: str = "meta") -> QuantizedWeight:
    """What a weight of this shape becomes; its numbers are missing, but for the groups of inputs."""
    if recipe.kind == "int4":
        return _groups(recipe, outputs, inputs, device)
    block = recipe.block or (1, inputs)
    codes = torch.empty(
        outputs, inputs, dtype=torch.float8_e4m3fn if recipe.kind == "fp8" else torch.int8, device=device
    )
    grid = -(-outputs // block[0]), -(-inputs // block[1])
    return QuantizedWeight(codes, torch.empty(grid, device=device), *block)


def _groups(recipe: Recipe, outputs: int, inputs: int, device: str) -> QuantizedWeight:
    size = inputs if recipe.block is None else math.gcd(recipe.block[1], inputs)
    groups, order = (outputs, inputs // size), None
    if recipe.ordered:
        shuffled = torch.randperm(inputs, generator=torch.Generator().manual_seed(ORDER_SEED))
        order = shuffled // size  # the same for all weights of as many inputs, as those of a merged product have it
    return QuantizedWeight(
        torch.empty(outputs, inputs, dtype=torch.uint8 if recipe.zeros else torch.int8, device=device),
        torch.empty(groups, device=device),
        1,
        size,
        torch.empty(groups, dtype=torch.int16, device=device) if recipe.zeros else None,
        order if order is None or device == "meta" else order.to(device),
        bits=4,
        scale_dtype=torch.float16,
    )


def quantise(recipe: Recipe, outputs: int, inputs: int, device: str, rows: Rows) -> QuantizedWeight:
    """The weight whose rows these are. They are asked for once each, in order."""
    made = form_of(recipe, outputs, inputs, device)
    height = made.outputs_per_scale
    step = max(1, PART_ELEMENTS // max(1, inputs * height)) * height
    for first in range(0, outputs, step):
        part = range(first, min(first + step, outputs))
        values = rows(part).to(torch.float32)
        if recipe.kind == "int4":
            _round_groups(recipe, values, made, part)
        else:
            _round_blocks(values, made, part)
    return made


def _round_blocks(values: torch.Tensor, made: QuantizedWeight, part: range) -> None:
    height, width = made.outputs_per_scale, made.inputs_per_scale
    largest = LARGEST[made.codes.dtype]
    num_rows, num_columns = values.shape
    whole = torch.nn.functional.pad(values, (0, -num_columns % width, 0, -num_rows % height))
    blocks = whole.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    scales = _nonzero(_quotient(blocks.abs().amax((1, 3)), largest))
    codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:num_rows, :num_columns]
    if made.codes.dtype == torch.int8:
        codes = codes.round()
    made.codes[part.start : part.stop].copy_(codes.clamp(-largest, largest))
    made.scales[part.start // height : -(-part.stop // height)].copy_(scales)


def _round_groups(recipe: Recipe, values: torch.Tensor, made: QuantizedWeight, part: range) -> None:
    rows, order = slice(part.start, part.stop), None
    if made.group_of_input is not None:
        order = torch.argsort(made.group_of_input, stable=True)
        values = values[:, order]
    groups = values.unflatten(1, (-1, made.inputs_per_scale))
    least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    steps = _quotient(most - least, 15.0) if recipe.zeros else _quotient(torch.maximum(most, -least), 7.5)
    scales = _nonzero(steps.to(made.scale_dtype).to(torch.float32))
    codes = (groups / scales[..., None]).round()
    if made.zeros is None:
        codes = codes.clamp(-8, 7)
    else:
        zeros = (-least / scales).round().clamp(0, 15)
        made.zeros[rows].copy_(zeros)
        codes = (codes + zeros[..., None]).clamp(0, 15)
    codes = codes.flatten(1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    made.codes[rows].copy_(codes)
    made.scales[rows].copy_(scales)


def _quotient(values: torch.Tensor, number: float) -> torch.Tensor:
    """Rounded once. A GPU divides by a plain number by way of its reciprocal, which rounds twice."""
    return values / torch.full_like(values, number)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """1 where all weights are 0."""
    return torch.where(scales > 0, scales, 1.0)
