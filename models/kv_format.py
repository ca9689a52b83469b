"""How keys and values are stored: as the numbers that attention computes with, or as 8-bit floats with scales.

`fp8` makes a scale for each key and value when it is written, which lies in the block beside it; `fp8_static` takes the
checkpoint's, one for all keys and one for all values of a layer, or of each head (models.kv_scales reads them).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

KV_DTYPES = ("auto", "fp8", "fp8_static")


@dataclass(frozen=True, slots=True)
class KvFormat:
    """What a pool holds."""

    dtype: torch.dtype
    quantised: bool = False
    static: torch.Tensor | None = None
    """Of quantised KV without scales in its blocks: float32 [layers, 2, KV heads] on the CPU, keys and values."""

    @classmethod
    def plain(cls, dtype: torch.dtype) -> KvFormat:
        return cls(dtype)

    @classmethod
    def fp8(cls, static: torch.Tensor | None = None) -> KvFormat:
        return cls(torch.float8_e4m3fn, True, static)

    @property
    def has_scales_inside(self) -> bool:
        """Whether each key and value has its scale in the pool."""
        return self.quantised and self.static is None

    def part(self, layers: range, heads: range) -> KvFormat:
        """Of these layers and heads of the model."""
        if self.static is None:
            return self
        own = self.static[layers.start : layers.stop, ..., heads.start : heads.stop]
        return replace(self, static=own.contiguous())

    def scales_digest(self) -> str:
        """SHA-256 of the static scales; empty where there are none."""
        if self.static is None:
            return ""
        values = self.static.to(torch.float32).contiguous()
        head = repr(list(values.shape)).encode()
        return hashlib.sha256(head + values.numpy().astype("<f4").tobytes()).hexdigest()
