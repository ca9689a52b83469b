"""How plain weights are quantised while they are loaded, by name: the values of `--quantization`. No torch.

Every weight goes to the nearest code of a scale that its own numbers give, without samples of text. `rounding` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.node.errors import SettingsError

VERSION = 1
"""Of the arithmetic; a change of a single code counts."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What codes are, and which weights share a scale."""

    kind: Literal["fp8", "int8", "int4"]
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale; None: all inputs of one output. Of int4, whose block has one output, the
    inputs are the most: fewer where they do not divide the weight."""
    zeros: bool = False
    """Of int4: with a zero point beside each scale."""
    ordered: bool = False
    """Of int4: groups are no runs of inputs."""

    @property
    def identity(self) -> bytes:
        """Two runs share KV only if this is equal."""
        return f"{self.kind} {self.block} {self.zeros} {self.ordered} version {VERSION}".encode()


RECIPES = {
    "fp8": Recipe("fp8"),
    "fp8_block": Recipe("fp8", (128, 128)),
    "int8": Recipe("int8"),
    "int4": Recipe("int4", (1, 128)),
    "int4_zeros": Recipe("int4", (1, 128), zeros=True),
}


def recipe_of(name: str | None, folder_method: str | None) -> Recipe | None:
    """Of `--quantization`, by a name or None, for a folder whose weights have been quantised by a method or None.
    SettingsError for an unknown name, and for weights that would be quantised twice."""
    if name is None:
        return None
    if name not in RECIPES:
        raise SettingsError(f"--quantization {name}: must be one of {', '.join(RECIPES)}")
    if folder_method is not None:
        raise SettingsError(
            f"--quantization {name}: the weights of this model are quantised already, by {folder_method}; leave the "
            f"option out"
        )
    return RECIPES[name]
