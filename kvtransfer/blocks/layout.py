"""The arithmetic of KV memory: what a unit and a block are, how large they are, where they lie in a pool. No torch.

A unit is one KV head's part of a block: its keys and values of `block_tokens` tokens in all layers, one contiguous
piece. A block is the units of one rank, one behind the other, and a pool is blocks:

    [num_blocks, units, layers, planes, block_tokens, head_dim]      planes: keys, values; or one

Latent attention has one unit of one plane, whose rows hold a token's latent and its rotated key.

So whatever moves or stores a block handles one large piece, and a rank with other heads takes whole units of it. All
units of a pool lie equally far apart: unit u of block b is row b * num_units + u of a pool of units.

Quantised KV with a scale for each key and value has the scales inside the unit, behind the data of the layer that they
belong to, float32 [planes, block_tokens], padded to whole rows of head_dim elements. So a block still is all that a
receiver needs, and its digest covers the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of one element by the dtype's name, as torch spells it."""
SCALE_BYTES = 4
"""Of one scale, a float32."""

Scales = Literal["none", "token", "static"]
"""What stored numbers are multiplied by: nothing; a scale of their own for each key and value (a token, a head), inside
the unit; or the checkpoint's scales, which are no part of a block."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one rank's KV. Two ends may exchange blocks only if their layouts are equal."""

    num_layers: int
    first_unit: int
    """The first KV head of this rank, of the model's `total_units`."""
    num_units: int
    """KV heads of this rank."""
    total_units: int
    head_dim: int
    block_tokens: int
    dtype: str
    padding_bytes: int = 0
    """Behind each unit, unused: a distance between units that spreads over a GPU's memory channels."""
    scales: Scales = "none"
    scales_digest: str = ""
    """SHA-256 of static scales, which decide what the bytes of a unit mean."""
    planes: int = 2
    """Keys and values; 1: both lie in one row."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_units", "total_units", "head_dim", "block_tokens", "planes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, at least 1 is needed")
        if not 0 <= self.first_unit <= self.total_units - self.num_units:
            raise ValueError(f"{self.num_units} units from {self.first_unit} on, of {self.total_units}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        if (self.scales == "static") != bool(self.scales_digest):
            raise ValueError(f"scales {self.scales!r} with the digest {self.scales_digest!r}")
        if self.scales == "token" and self.row_bytes % SCALE_BYTES:
            raise ValueError(f"scales cannot follow rows of {self.row_bytes} bytes, no multiple of {SCALE_BYTES}")
        if self.padding_bytes < 0 or self.padding_bytes % self.row_bytes:
            raise ValueError(f"padding of {self.padding_bytes} bytes is not made of rows of {self.row_bytes}")

    @classmethod
    def of_model(
        cls,
        *,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        block_tokens: int,
        dtype: str,
        padding_bytes: int = 0,
        scales: Scales = "none",
        scales_digest: str = "",
        planes: int = 2,
    ) -> KVLayout:
        """The layout of a rank that holds all heads of a model."""
        return cls(
            num_layers,
            0,
            kv_heads,
            kv_heads,
            head_dim,
            block_tokens,
            dtype,
            padding_bytes,
            scales,
            scales_digest,
            planes,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of the key or the value of one token, in one head and layer."""
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def data_bytes(self) -> int:
        """Of a layer of a unit: keys and values without their scales."""
        return self.planes * self.block_tokens * self.row_bytes

    @property
    def layer_bytes(self) -> int:
        """Distance between two layers of a unit, which lie without gaps."""
        if self.scales != "token":
            return self.data_bytes
        scale_rows = -(-self.planes * self.block_tokens * SCALE_BYTES // self.row_bytes)
        return self.data_bytes + scale_rows * self.row_bytes

    @property
    def unit_bytes(self) -> int:
        """Distance between two units."""
        return self.num_layers * self.layer_bytes + self.padding_bytes

    @property
    def block_bytes(self) -> int:
        """Distance between two blocks."""
        return self.num_units * self.unit_bytes

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """[num_blocks, num_units, num_layers, planes, block_tokens, head_dim]."""
        return (num_blocks, self.num_units, self.num_layers, self.planes, self.block_tokens, self.head_dim)

    @property
    def strides(self) -> tuple[int, int, int, int, int, int]:
        """Of that shape, in elements."""
        size = DTYPE_BYTES[self.dtype]
        plane = self.block_tokens * self.head_dim
        return (
            self.block_bytes // size,
            self.unit_bytes // size,
            self.layer_bytes // size,
            plane,
            self.head_dim,
            1,
        )

    def scales_shape(self, num_blocks: int) -> tuple[int, int, int, int, int]:
        """[num_blocks, num_units, num_layers, planes, block_tokens] of the scales inside units."""
        return (num_blocks, self.num_units, self.num_layers, self.planes, self.block_tokens)

    @property
    def scales_strides(self) -> tuple[int, int, int, int, int]:
        """Of that shape, in scales; the first lies data_bytes behind the begin of the pool."""
        distances = (self.block_bytes, self.unit_bytes, self.layer_bytes)
        block, unit, layer = (distance // SCALE_BYTES for distance in distances)
        return (block, unit, layer, self.block_tokens, 1)

    def fingerprint_fields(self) -> tuple[str | int, ...]:
        """Every fact that decides what a byte of a unit means, in a fixed order; goes into the namespace digest.

        Which units a rank holds is none of them: ranks of any number exchange units.
        """
        scales = () if self.scales == "none" else (self.scales, self.scales_digest)
        return (
            "unit,layer,plane,token,dim",
            self.total_units,
            self.num_layers,
            self.planes,
            self.head_dim,
            self.block_tokens,
            self.dtype,
            self.unit_bytes,
            *scales,
        )
