"""In which order a step runs through the parts of layers; a device brings the operations.

What an operation reads and writes is the device's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch

from baton.kernels import Linear
from baton.models.layer_weights import LayerWeights, Weights
from baton.node.errors import InvariantBroken

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


def run_layers(weights: Weights, ops: LayerOps[X, A], indices: Iterable[int]) -> torch.Tensor | None:
    """The final norm's output of the tokens that draw, [drawn, hidden]; None if none does.

    indices: of the layers to run, in rising order and with the last; all of them, but for a rehearsal.
    """
    layers = weights.layers
    x = ops.norm(layers[0].input_norm, layers[0].attention.qkv)
    for index in indices:
        layer = layers[index]
        attended = ops.attention(index, layer, x)
        if attended is None:
            return None
        x = ops.add_and_norm(attended, layer.attention_output_norm, layer.post_norm, layer.mlp.reader)
        added = ops.mlp(layer, x)
        if index + 1 == len(layers):
            return ops.finish(added, layer.mlp_output_norm, weights.norm)
        following = layers[index + 1]
        x = ops.add_and_norm(added, layer.mlp_output_norm, following.input_norm, following.attention.qkv)
    raise InvariantBroken("the last layer was left out")
