"""The arithmetic of KV memory: what a block is, how large it is, how a pool of blocks is shaped. No torch, no memory.

A pool is block-first, `[num_blocks, num_layers, 2, block_tokens, kv_heads, head_dim]`: one block is contiguous over all
layers (K then V in each), so whatever moves or stores a block handles one large piece.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of one element by the dtype's name, as torch spells it."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one rank's KV. Two ends may exchange blocks only if their layouts are equal."""

    num_layers: int
    kv_heads: int
    """KV heads of this rank, so the model's divided by the tensor-parallel size."""
    head_dim: int
    block_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("num_layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, at least 1 is needed")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is none of {', '.join(DTYPE_BYTES)}")

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.num_layers * 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """[num_blocks, num_layers, 2, block_tokens, kv_heads, head_dim]."""
        return (num_blocks, self.num_layers, 2, self.block_tokens, self.kv_heads, self.head_dim)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens, the last one perhaps in part."""
        if num_tokens < 0:
            raise ValueError(f"{num_tokens} tokens")
        return -(-num_tokens // self.block_tokens)

    def fingerprint_fields(self) -> tuple[str | int, ...]:
        """Every fact that decides what a byte of a block means, in a fixed order; goes into the namespace digest."""
        return (
            "block,layer,kv,token,head,dim",
            self.num_layers,
            self.kv_heads,
            self.head_dim,
            self.block_tokens,
            self.dtype,
        )
