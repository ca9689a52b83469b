"""What all wrappers share: the check of an argument, the options of a launch, and launches that are repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.compiler import CompiledKernel

ALIGNED_BYTES = 16
"""Kernels are compiled for tensors that begin at multiples of it, and again for others."""


def require(holds: bool, message: str) -> None:
    """Raises ValueError unless the condition holds: a kernel with a wrong shape would read memory that is not its."""
    if not holds:
        raise ValueError(message)


def cdiv(count: int, size: int) -> int:
    """Groups of `size` for `count`. Triton's own functions of these names take the host some 2 us."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is no less; count from 1 on."""
    return 1 << (count - 1).bit_length()


def launch_options(num_warps: int, pdl: bool, num_stages: int | None = None) -> dict[str, int | bool]:
    """Keyword arguments of a launch. `launch_pdl` only where it is wanted: the interpreter does not know it."""
    options: dict[str, int | bool] = {"num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if pdl:
        options["launch_pdl"] = True
    return options


def launch_nothing(*arguments: object) -> None:
    """Of no rows."""


class Launch:
    """A launch that is repeated with other values of a few arguments.

        launch = Launch(kernel, grid, *arguments, CONSTANT=..., num_warps=4)
        launch(layer=3); launch(layer=4, weight_ptr=weight)

    Most of what `kernel[grid](...)` takes is to find what is compiled for such arguments, by the type, value or
    alignment of each. Here the first launch finds it and the others go there. So what changes may only be integers that
    the kernel is not specialised for, and tensors like the ones before them.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """constants: the other arguments of the kernel, and options of its launch."""
        options = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        self._arguments = {name: options.pop(name) for name in kernel.arg_names}
        self._kernel, self._options = kernel, options
        self._found: CompiledKernel | None = None
        self.over(grid)

    def over(self, grid: tuple[int, ...]) -> Launch:
        """The same, over another grid from now on."""
        self._grid = (*grid, 1, 1)[:3]
        self._find = self._kernel[self._grid]
        self._compiled: Callable[..., None] | None = None if self._found is None else self._found[self._grid]
        return self

    def __call__(self, **changed: int | torch.Tensor) -> None:
        """changed: by the kernel's names; ValueError for a tensor of another dtype or shape."""
        aligned = True
        for name, value in changed.items():
            if isinstance(value, torch.Tensor):
                self._require_like(self._arguments[name], value)
                aligned &= value.data_ptr() % ALIGNED_BYTES == 0
            self._arguments[name] = value
        if aligned and self._compiled is not None:
            self._compiled(*self._arguments.values())
            return
        found = self._find(*self._arguments.values(), **self._options)
        if aligned and isinstance(found, CompiledKernel):  # None where kernels are interpreted, or only asked for
            self._found, self._compiled = found, found[self._grid]

    def _require_like(self, before: torch.Tensor, tensor: torch.Tensor) -> None:
        same = tensor.dtype == before.dtype and tensor.shape == before.shape
        require(same and tensor.stride() == before.stride(), "a repeated launch got a tensor unlike the one before")
