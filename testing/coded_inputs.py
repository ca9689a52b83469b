"""A model whose products take their inputs in codes too, as a GPU's kernels for FP8 and INT8 do: the reference for
them, by plain operations. Inputs are rounded to codes and back; what multiplies them stays exact."""

from __future__ import annotations

from dataclasses import replace

import torch

from baton.kernels import Linear
from baton.kernels.reference import quantise
from baton.models.layer_weights import AttentionWeights, DenseMlpWeights, LayerWeights, Weights

RUNS = 128
"""Inputs that share a scale beside weights with scales of blocks."""


class CodedInputs:
    """A product of rounded rows."""

    def __init__(self, linear: Linear, code_type: torch.dtype, run: int | None) -> None:
        """run: inputs that share a scale; None: all of a row."""
        self._linear, self._code_type, self._run = linear, code_type, run or linear.num_inputs
        self.weight_format, self.bias = linear.weight_format, linear.bias
        self.num_outputs, self.num_inputs = linear.num_outputs, linear.num_inputs

    @property
    def size_bytes(self) -> int:
        return self._linear.size_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N]"""
        codes, scales = quantise(x, self._code_type, self._run)
        rounded = codes.float().unflatten(1, (-1, self._run)) * scales.t()[..., None]
        return self._linear(rounded.flatten(1).to(x.dtype))

    def pack(self, keep_weight: bool = False) -> None:
        self._linear.pack(keep_weight)


def with_coded_inputs(weights: Weights, code_type: torch.dtype, run: int | None) -> Weights:
    """The same weights; the head takes its inputs as they are."""

    def coded(linear: Linear) -> CodedInputs:
        return CodedInputs(linear, code_type, run)

    def layer(plain: LayerWeights) -> LayerWeights:
        attention, mlp = plain.attention, plain.mlp
        assert isinstance(mlp, DenseMlpWeights), "of experts no inputs are coded"
        assert isinstance(attention, AttentionWeights), "nor of latent attention"
        return replace(
            plain,
            attention=AttentionWeights(coded(attention.qkv), attention.head_norms, coded(attention.o)),
            mlp=DenseMlpWeights(coded(mlp.gate_up), coded(mlp.down)),
        )

    return replace(weights, layers=tuple(map(layer, weights.layers)))
