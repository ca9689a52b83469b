"""Which quantised weights of a checkpoint can stay so on a device, and the memory for them.

The projections of a merged product must have one layout; their rows are cut by rank. What has none of the layouts of
baton.kernels.linear becomes plain numbers: codes of INT8 and INT4 with zero points of rows, GPTQ's of 8 bits, groups
that a rank would have to cut through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from baton.kernels import GroupedLinear, ScaledLinear
from baton.kernels.linear.grouped import CODES_PER_WORD, block_size
from baton.models.places import GroupedPlace, ScaledPlace, WeightCut
from baton.models.quantization.weight import QuantizedWeight

WIDEST_GROUP = 128
"""Inputs of a group of 4-bit codes. Scales of wider ones are repeated, so that few widths need a kernel."""
CODES_OF_8_BITS = (torch.float8_e4m3fn, torch.int8)


class KeptPart(NamedTuple):
    """A projection of a merged product."""

    form: QuantizedWeight
    """Its numbers may be missing, but for the groups of inputs."""
    outputs: WeightCut


KeptLinear: TypeAlias = "tuple[ScaledLinear, list[ScaledPlace]] | tuple[GroupedLinear, list[GroupedPlace]]"


def keep_quantised(
    parts: Sequence[KeptPart], inputs: WeightCut, bias: torch.Tensor | None, device: str
) -> KeptLinear | None:
    """Memory for the product of the parts, and the place of each; None if it has to be of plain numbers."""
    return _scaled(parts, inputs, bias, device) or _grouped(parts, inputs, bias, device)


def _scaled(
    parts: Sequence[KeptPart], inputs: WeightCut, bias: torch.Tensor | None, device: str
) -> tuple[ScaledLinear, list[ScaledPlace]] | None:
    forms, first = [part.form for part in parts], parts[0].form
    if first.codes.dtype not in CODES_OF_8_BITS or any(
        form.codes.dtype != first.codes.dtype
        or form.bits != 8
        or form.inputs_per_scale != first.inputs_per_scale
        or form.zeros is not None
        or form.group_of_input is not None
        for form in forms
    ):
        return None
    num_inputs = len(inputs.part)
    width = first.inputs_per_scale
    if width >= inputs.total:
        width = num_inputs
    elif inputs.part.start % width or (num_inputs % width and inputs.part.stop != inputs.total):
        return None
    height = 1 if width == num_inputs else _outputs_per_scale(parts)  # one scale a tensor becomes one a row
    num_outputs, columns = sum(len(part.outputs.part) for part in parts), -(-num_inputs // width)
    codes = torch.empty(num_outputs, num_inputs, dtype=first.codes.dtype, device=device)
    grid = torch.empty(-(-num_outputs // height), columns, dtype=torch.float32, device=device)
    scales = grid.view(-1) if (height, width) == (1, num_inputs) else grid
    places, start = [], 0
    for part in parts:
        end = start + len(part.outputs.part)
        rows = grid[start // height : -(-end // height)]
        places.append(ScaledPlace(codes[start:end], rows, height, part.outputs, inputs))
        start = end
    return ScaledLinear(codes, scales, height, width, bias), places


def _outputs_per_scale(parts: Sequence[KeptPart]) -> int:
    """The most with which no scale stands for rows of two parts, or for another run of rows than in the files."""
    sizes = [len(part.outputs.part) for part in parts]
    cuts = [part.outputs.part.start for part in parts]
    return math.gcd(*(part.form.outputs_per_scale for part in parts), *sizes[:-1], *cuts)


def _grouped(
    parts: Sequence[KeptPart], inputs: WeightCut, bias: torch.Tensor | None, device: str
) -> tuple[GroupedLinear, list[GroupedPlace]] | None:
    forms, first = [part.form for part in parts], parts[0].form
    num_inputs = len(inputs.part)
    width = _group_width(first.inputs_per_scale)
    block = block_size(num_inputs, width)
    if (
        block is None
        or any(form.bits > 4 or form.outputs_per_scale != 1 for form in forms)
        or any(form.inputs_per_scale != first.inputs_per_scale for form in forms)
        or inputs.total % first.inputs_per_scale
        or num_inputs % width
        or inputs.part.start % width
    ):
        return None
    order, *others = (_order(form, inputs.total) for form in forms)
    if order is None or any(other is None or not torch.equal(other, order) for other in others):
        return None
    sorted_already = bool((order == torch.arange(inputs.total)).all())
    if not sorted_already and num_inputs < inputs.total:
        return None
    num_outputs, num_groups = sum(len(part.outputs.part) for part in parts), num_inputs // width
    scale_dtypes = {form.scale_dtype for form in forms}
    scale_dtype = first.scale_dtype if len(scale_dtypes) == 1 else torch.float32
    words = torch.empty(num_outputs, num_inputs // CODES_PER_WORD, dtype=torch.int16, device=device)
    scales = torch.empty(num_groups, num_outputs, dtype=scale_dtype, device=device)
    zeros = None
    if any(form.zeros is not None for form in forms):
        zeros = torch.empty(num_groups, num_outputs, dtype=torch.int8, device=device)
    kept_order = None if sorted_already else order.to(device, torch.int32)
    places, start = [], 0
    for part in parts:
        end = start + len(part.outputs.part)
        rows = slice(start, end)
        zeros_of = None if zeros is None else zeros[:, rows]
        of_part = words[rows], scales[:, rows], zeros_of, kept_order, block, width
        places.append(GroupedPlace(*of_part, part.outputs, inputs))
        start = end
    return GroupedLinear(words, scales, zeros, block, kept_order, bias), places


def _group_width(inputs_per_scale: int) -> int:
    return WIDEST_GROUP if inputs_per_scale % WIDEST_GROUP == 0 else inputs_per_scale


def _order(form: QuantizedWeight, num_inputs: int) -> torch.Tensor | None:
    """[K]: the inputs sorted by group; None if groups differ in size."""
    if form.group_of_input is None:
        return torch.arange(num_inputs)
    groups = form.group_of_input.cpu()
    order = torch.argsort(groups, stable=True)
    return order if torch.equal(groups[order], torch.arange(num_inputs) // form.inputs_per_scale) else None
