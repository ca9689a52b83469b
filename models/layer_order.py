"""In which order a step runs through the parts of layers; a device brings the operations.

What an operation reads and writes is the device's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch

from baton.kernels import Linear
from baton.models.layer_weights import LayerWeights, Weights

X = TypeVar("X")
"""Rows [N, hidden] as a device hands them to a product: plain or, where the product wants them so, quantised."""
A = TypeVar("A")
"""What a part of a layer adds to the residual, as a device has it: [N, hidden], or parts still to be summed."""


Tap = Callable[[int, torch.Tensor], None]
"""tap(layer, residual [N, hidden] before it): called while a step runs, which changes the residual afterwards."""


def no_tap(layer: int, residual: torch.Tensor) -> None:
    """Nothing looks at hidden states."""


class LayerOps(Protocol[X, A]):
    """A device's operations on one step, which holds its residual h [N, hidden].

    A norm knows the product that reads it.
    """

    def norm(self, weight: torch.Tensor, reader: Linear) -> X:
        """Of the residual."""
        ...

    def attention(self, index: int, layer: LayerWeights, x: X) -> A | None:
        """What layer number `index` adds to the residual, with keys and values written to the pool. None: no token of
        the step draws and this is the last layer, so that nothing behind its keys and values is of use."""
        ...

    def mlp(self, layer: LayerWeights, x: X) -> A:
        """What the layer's MLP adds to the residual."""
        ...

    def add_and_norm(self, added: A, output_norm: torch.Tensor | None, weight: torch.Tensor, reader: Linear) -> X:
        """The residual takes `added`, normed by `output_norm` if there is one; its norm."""
        ...

    def finish(self, added: A, output_norm: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """The same behind the last layer, of the tokens that draw, plain: [drawn, hidden]."""
        ...


def run_layers(weights: Weights, ops: LayerOps[X, A]) -> torch.Tensor | None:
    """The final norm's output of the tokens that draw, [drawn, hidden]; None if none does."""
    return end_layers(weights, ops, begin_layers(weights, ops, range(len(weights.layers) - 1)))


def begin_layers(weights: Weights, ops: LayerOps[X, A], indices: Iterable[int]) -> X:
    """What the last layer's attention reads: all before depends on no draw.

    indices: of the layers to run, in rising order and without the last; all of them, but for a rehearsal.
    """
    layers = weights.layers
    x = ops.norm(layers[0].input_norm, layers[0].attention.qkv)
    for index in indices:
        following = layers[index + 1]
        attended = ops.attention(index, layers[index], x)
        assert attended is not None, "not the last layer"
        added = _mlp(layers[index], ops, attended)
        x = ops.add_and_norm(added, layers[index].mlp_output_norm, following.input_norm, following.attention.qkv)
    return x


def end_layers(weights: Weights, ops: LayerOps[X, A], x: X) -> torch.Tensor | None:
    """The last layer on what `begin_layers` returned; the same as `run_layers`."""
    last = weights.layers[-1]
    attended = ops.attention(len(weights.layers) - 1, last, x)
    return None if attended is None else ops.finish(_mlp(last, ops, attended), last.mlp_output_norm, weights.norm)


def _mlp(layer: LayerWeights, ops: LayerOps[X, A], attended: A) -> A:
    """What the layer's MLP adds, once the residual has what attention adds."""
    x = ops.add_and_norm(attended, layer.attention_output_norm, layer.post_norm, layer.mlp.reader)
    return ops.mlp(layer, x)
