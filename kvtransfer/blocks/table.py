"""The blocks behind one sequence: its cached prefix, its growth, the naming of full blocks, and giving them all back.

A table holds one reference on each of its blocks. It knows tokens only to name blocks, and moves no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.kvtransfer.blocks.hashing import extend
from baton.kvtransfer.blocks.manager import BlockManager


class BlockTable:
    """`root` is the hash that the first block is chained to; `hashes` name the first full blocks, where known."""

    def __init__(self, manager: BlockManager, root: bytes, block_tokens: int, hashes: Sequence[bytes] = ()) -> None:
        self.blocks: list[int] = []
        self._manager = manager
        self._root = root
        self.block_tokens = block_tokens
        self._hashes = list(hashes)
        self._named = 0  # blocks published, or found published, so far

    def take_prefix(self, limit_tokens: int) -> int:
        """Take the longest cached prefix of at most `limit_tokens` tokens into an empty table; returns its tokens."""
        assert not self.blocks, f"a table of {len(self.blocks)} blocks cannot take a prefix"
        self.blocks = self._manager.match(self._hashes[: limit_tokens // self.block_tokens])
        self._named = len(self.blocks)
        return len(self.blocks) * self.block_tokens

    def names(self, limit_tokens: int | None = None) -> tuple[bytes, ...]:
        """The names of the first full blocks, as far as they are known, of at most `limit_tokens` tokens."""
        return tuple(self._hashes[: None if limit_tokens is None else limit_tokens // self.block_tokens])

    def blocks_lacking(self, num_tokens: int) -> int:
        """Blocks to allocate before `num_tokens` tokens fit."""
        return max(0, -(-num_tokens // self.block_tokens) - len(self.blocks))

    def grow(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in all; raises OutOfBlocks and changes nothing if there is none."""
        if lacking := self.blocks_lacking(num_tokens):
            self.blocks += self._manager.allocate(lacking)

    def publish(self, token_ids: Sequence[int], num_computed: int) -> None:
        """The KV of the first `num_computed` tokens is present: name every full block, so that others may share it."""
        full = min(num_computed // self.block_tokens, len(self.blocks))
        while self._named < full:
            if self._named == len(self._hashes):
                parent = self._hashes[-1] if self._hashes else self._root
                begin = self._named * self.block_tokens
                self._hashes.append(extend(parent, token_ids[begin : begin + self.block_tokens]))
            self._manager.publish(self.blocks[self._named], self._hashes[self._named])
            self._named += 1

    def release(self) -> None:
        """Give all references back. Tails go first, so that a chain is evicted from its end."""
        self._manager.release(self.part_with())

    def part_with(self) -> list[int]:
        """All blocks, tail first; the caller releases the references. The table is empty afterwards."""
        blocks, self.blocks = self.blocks[::-1], []
        self._named = 0
        return blocks

    def lease(self, key: bytes) -> None:
        """Exchange the references for a lease called `key`."""
        self._manager.lease(self.blocks, key)
        self.release()

    def quarantine_from(self, first_block: int, key: bytes) -> None:
        """Something may still write to the blocks from `first_block` on: they rest under `key`, the others go back."""
        tail, self.blocks = self.blocks[first_block:], self.blocks[:first_block]
        self._manager.quarantine(tail, key)
        self.release()
