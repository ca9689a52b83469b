"""What a product with a weight is, whatever the weight's format."""

from __future__ import annotations

from typing import Protocol

import torch


class HeldWeight(Protocol):
    """The weights of a product, or of the same product of several experts, on a device."""

    @property
    def weight_format(self) -> str:
        """Names how the weight lies in memory, and so which kernels can read it."""
        ...

    @property
    def num_outputs(self) -> int:
        """Of one expert."""
        ...

    @property
    def num_inputs(self) -> int: ...

    @property
    def size_bytes(self) -> int:
        """What it takes of its device's memory, as it lies there now."""
        ...

    def pack(self, keep_weight: bool = False) -> None:
        """Prepare for the CPU's products, once; unless it is kept, the weight as it was loaded is gone afterwards."""
        ...


class Linear(HeldWeight, Protocol):
    """A product with a weight of N outputs and K inputs."""

    @property
    def bias(self) -> torch.Tensor | None:
        """[N]"""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N], by plain operations: the CPU's, and the reference of kernels."""
        ...
