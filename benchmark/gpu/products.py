"""Products as a step makes them, by the format of their weights: time, and the rate at which the weights are read.

Formats take turns shape by shape and row by row, so that a disturbance meets all alike. Rows that a product takes in
codes are so from the start, since the norm makes them. Behind a split product the time of summing its parts is not in:
the kernel that reads them does that anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from baton.benchmark.gpu.ceilings import GPU, randn
from baton.benchmark.gpu.kernel_report import KernelReport
from baton.benchmark.gpu.runners import PLAIN
from baton.kernels import DenseLinear, GroupedLinear, Linear
from baton.kernels.triton.linear_policy import DOWN_8B, GATE_UP_8B, HEAD_8B, O_8B, QKV_8B, ProductShape
from baton.kernels.triton.quantise import quantise as put_in_codes
from baton.models.cuda.products import PADDING, Products, fastest, shape_of
from baton.models.places import WeightCut
from baton.models.quantization.kept import KeptPart, keep_quantised
from baton.models.quantization.recipe import RECIPES
from baton.models.quantization.rounding import form_of, quantise

SHAPES = {"qkv": QKV_8B, "o": O_8B, "gate_up": GATE_UP_8B, "down": DOWN_8B, "lm_head": HEAD_8B}
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
ROTATED_BYTES = 400 << 20
"""Several times the L2 cache."""


def products(report: KernelReport) -> None:
    for name, shape in SHAPES.items():
        outputs = shape.outputs * (2 if shape.fused else 1)
        formats = [PLAIN] if name == "lm_head" else report.quantizations
        weights = {each: rotated(each, outputs, shape.inputs) for each in formats}
        made = {
            each: Products(fastest, ROWS[-1], [shape_of(some[0], shape.fused)], torch.bfloat16, GPU)
            for each, some in weights.items()
        }
        for rows in ROWS if name != "lm_head" else ROWS[:7]:
            x, out = randn(rows, shape.inputs), randn(rows + PADDING, shape.outputs)[:rows]
            for each, some in weights.items():
                given = made[each].codes_for(some[0], rows)
                if given is not None:
                    put_in_codes(x, given)
                calls = [partial(call(made[each], shape), one, given or x, out, pdl=rows <= 128) for one in some]
                report.moved("product", some[0].size_bytes, calls, name=name, rows=rows, quantization=each)


def call(made: Products, shape: ProductShape) -> Callable[..., object]:
    return made.gated if shape.fused else made


def rotated(quantization: str, outputs: int, inputs: int) -> list[Linear]:
    """Random weights that the L2 cache does not hold together."""
    first = random_linear(quantization, outputs, inputs)
    return [first, *(random_linear(quantization, outputs, inputs) for _ in range(ROTATED_BYTES // first.size_bytes))]


def random_linear(quantization: str, outputs: int, inputs: int) -> Linear:
    if quantization == PLAIN:
        return DenseLinear(randn(outputs, inputs).mul_(inputs**-0.5))
    recipe = RECIPES[quantization]
    part = KeptPart(form_of(recipe, outputs, inputs), WeightCut.whole(outputs))
    kept = keep_quantised([part], WeightCut.whole(inputs), None, GPU)
    assert kept is not None, "recipes make what has a layout"
    linear, (place,) = kept
    place.fill(quantise(recipe, outputs, inputs, GPU, lambda rows: randn(len(rows), inputs).mul_(inputs**-0.5)))
    if isinstance(linear, GroupedLinear):
        linear.finish()
    return linear
