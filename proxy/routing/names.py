"""The names of one request's blocks: hashed once, before it is routed, and sent along with both of its legs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from baton.kvtransfer.blocks.hashing import block_hashes, root_hash
from baton.proxy.routing.cluster import Shape


@dataclass(frozen=True, slots=True)
class Names:
    """What the blocks of so many tokens are called in a namespace."""

    shape: Shape
    num_tokens: int
    root: bytes
    hashes: tuple[bytes, ...]

    @classmethod
    def of(cls, shape: Shape, token_ids: tuple[int, ...]) -> Names:
        root = root_hash(shape.namespace)
        return cls(shape, len(token_ids), root, block_hashes(root, token_ids, shape.block_tokens))

    def name(self, shape: Shape, num_tokens: int) -> bool:
        """Whether they are those of so many tokens of the same request in a cluster of this shape."""
        mine, other = self.shape, shape
        same = (mine.namespace, mine.block_tokens) == (other.namespace, other.block_tokens)
        return same and self.num_tokens == num_tokens

    @property
    def cacheable(self) -> tuple[bytes, ...]:
        """Of the blocks that a cache may have: the last token must be computed."""
        return self.hashes[: (self.num_tokens - 1) // self.shape.block_tokens]
