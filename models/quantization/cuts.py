"""The part of a quantised weight's tensors that a rank needs of them, where several codes lie in a word.

It is rounded outwards to whole words and whole groups, so that what is cut out is a smaller weight of the same layout.
Tensors lie in a file's pages until they are moved: of rows that follow one another no more is read than the part. Of
columns, as AWQ and GPTQ have outputs and compressed-tensors inputs, the file's pages hold those of other ranks too; but
only the part is brought to the device and unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum, auto
from typing import NamedTuple

import torch

from baton.models.quantization.weight import QuantizedWeight

WHOLE_WORDS = 32
"""So many codes fill words, of however many bits they are."""


class Axis(Enum):
    """What a dimension of a tensor counts."""

    OUTPUTS = auto()
    OUTPUT_WORDS = auto()
    INPUTS = auto()
    INPUT_WORDS = auto()
    GROUPS = auto()
    GROUP_OF_INPUT = auto()
    """Inputs; the values are numbers of groups."""


Axes = tuple[tuple[str, tuple[Axis, ...]], ...]
"""Of each tensor of a layout: its role, and its dimensions."""


class WeightWindow(NamedTuple):
    """Part of a weight."""

    outputs: range
    inputs: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.outputs), len(self.inputs)


def cut(
    tensors: Mapping[str, torch.Tensor], axes: Axes, form: QuantizedWeight, outputs: range, inputs: range
) -> tuple[WeightWindow, dict[str, torch.Tensor]]:
    """Views of the tensors of a weight of this form, with at least these outputs and inputs of it."""
    axes_of, (num_outputs, num_inputs) = dict(axes), form.codes.shape
    group = min(form.inputs_per_scale, num_inputs)
    rows = _rounded(outputs, WHOLE_WORDS, num_outputs)
    of_groups = WHOLE_WORDS if group == num_inputs else math.lcm(WHOLE_WORDS, group)  # any part of one group is one
    columns = _rounded(inputs, of_groups, num_inputs)
    groups = range(columns.start // group, -(-columns.stop // group))
    by_input = [role for role in tensors if Axis.GROUP_OF_INPUT in axes_of[role]]
    if any(_group_numbers(tensors[role], columns, groups) is None for role in by_input):
        columns, groups = range(num_inputs), range(-(-num_inputs // group))
    window = WeightWindow(rows, columns)

    def span(axis: Axis) -> slice:
        part = rows if axis in (Axis.OUTPUTS, Axis.OUTPUT_WORDS) else columns
        if axis is Axis.GROUPS:
            part = groups
        if axis in (Axis.OUTPUT_WORDS, Axis.INPUT_WORDS):
            return slice(part.start * form.bits // 32, -(-part.stop * form.bits // 32))
        return slice(part.start, part.stop)

    found = {role: tensor[tuple(span(axis) for axis in axes_of[role])] for role, tensor in tensors.items()}
    for role in by_input:
        numbers = _group_numbers(tensors[role], columns, groups)
        found[role] = found[role] if numbers is None else numbers  # None of all: the layout says what is wrong
    return window, found


def _rounded(part: range, unit: int, total: int) -> range:
    return range(part.start // unit * unit, min(total, -(-part.stop // unit) * unit))


def _group_numbers(groups_of_inputs: torch.Tensor, inputs: range, groups: range) -> torch.Tensor | None:
    """Of these inputs, counted from the first of these groups; None if one is in another group."""
    least, most = (int(each) for each in groups_of_inputs.aminmax())
    part = groups_of_inputs[inputs.start : inputs.stop]
    if least == most:  # no order, see models.quantization.layouts
        return part
    least, most = (int(each) for each in part.aminmax())
    return part - groups.start if groups.start <= least and most < groups.stop else None
