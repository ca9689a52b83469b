"""Random weights of a model's shape, for benchmarks: `--load-format dummy`. Plain, or quantised as a recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from zlib import crc32

import torch

from baton.models.fingerprint import DUMMY_SEED, DUMMY_STD
from baton.models.places import PlainPlace, WeightPlace
from baton.models.quantization.recipe import Recipe
from baton.models.quantization.rounding import quantise


def fill_randomly(places: Mapping[str, WeightPlace], recipes: Mapping[str, Recipe]) -> None:
    """Norm weights 1, biases 0, the rest normal: a decoder that computes, though it says nothing. `recipes`: of weights
    that are quantised, part by part, so that no plain one takes memory.

    A GPU makes its own numbers, in a hundredth of the time: they differ from the CPU's. A tensor's numbers follow from
    its name, and of one that ranks share each draws the whole, so that ranks and stages together have the numbers of
    one process.
    """
    device = next(iter(places.values())).device
    generator = torch.Generator(device)

    def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        dtype = torch.float32 if device.type == "cpu" else dtype
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, DUMMY_STD, generator=generator)

    for name, place in places.items():
        generator.manual_seed(DUMMY_SEED ^ crc32(name.encode()))
        if name in recipes:
            outputs, inputs = place.shape
            rows = partial(_rows, draw, inputs)
            place.fill(quantise(recipes[name], outputs, inputs, str(device), rows))
            continue
        if not isinstance(place, PlainPlace):  # several projections in one tensor
            place.fill(draw(torch.bfloat16, *place.shape))
        elif name.endswith("norm.weight"):
            place.target.fill_(1.0)
        elif name.endswith(".bias"):
            place.target.zero_()
        elif device.type != "cpu" and place.target.shape == place.shape:
            # in place: there is no room for two of the largest
            place.target.normal_(0.0, DUMMY_STD, generator=generator)
        else:
            place.fill(draw(place.target.dtype, *place.shape))


def _rows(draw: Callable[..., torch.Tensor], inputs: int, part: range) -> torch.Tensor:
    return draw(torch.bfloat16, len(part), inputs)
