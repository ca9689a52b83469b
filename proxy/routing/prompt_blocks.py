"""The block hashes of one attempt's tokens, as routing and both legs use them. Pure.

They depend on what the cluster serves. That may change while a request waits, so they are made where a route is, from
the cluster as it is then; the last ones are kept, so that waiting costs no hashing.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.kvtransfer.blocks.hashing import block_hashes, root_hash
from baton.proxy.routing.model_workers import ClusterShape
from baton.proxy.routing.router import RequestView


@dataclass(frozen=True, slots=True)
class BlockNames:
    """The blocks of `num_tokens` tokens in one namespace."""

    shape: ClusterShape
    num_tokens: int
    root: bytes
    hashes: tuple[bytes, ...]

    @property
    def num_blocks(self) -> int:
        """The last one included, which may not be full."""
        return -(-self.num_tokens // self.shape.block_tokens)

    def view(self, *, turn: int, avoid: frozenset[str], session: bytes) -> RequestView:
        """The request as the router sees it."""
        return RequestView(
            num_tokens=self.num_tokens,
            num_blocks=self.num_blocks,
            turn=turn,
            avoid=avoid,
            block_tokens=self.shape.block_tokens,
            hashes=self.cacheable,
            session=session,
        )

    @property
    def cacheable(self) -> tuple[bytes, ...]:
        """Of the blocks that a cache may have: the last token must be computed."""
        return self.hashes[: (self.num_tokens - 1) // self.shape.block_tokens]


class PromptBlocks:
    """Tokens whose blocks are hashed on demand, once a namespace.

    `salt` and `lora` are those of kvtransfer.blocks.hashing: prompts of different ones share no block.
    """

    def __init__(self, token_ids: tuple[int, ...], salt: bytes = b"", lora: bytes = b"") -> None:
        self.token_ids = token_ids
        self._salt, self._lora = salt, lora
        self._names: BlockNames | None = None

    def under(self, shape: ClusterShape) -> BlockNames:
        """The blocks as a cluster of this shape names them."""
        names = self._names
        key = (shape.namespace, shape.block_tokens)
        if names is None or (names.shape.namespace, names.shape.block_tokens) != key:
            root = root_hash(shape.namespace, self._salt, self._lora)
            hashes = block_hashes(root, self.token_ids, shape.block_tokens)
            names = self._names = BlockNames(shape, len(self.token_ids), root, hashes)
        return names
