"""The data plane of one host without a network: the receiver maps the sender's pool and copies out of it.

It pulls: the receiver copies when it posts, the sender does nothing, and the protocol asks the sender afterwards if its
lease held. A mapping outlives the death of its owner, so a copy succeeds even then; only that question shows it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from baton.kvtransfer.blocks.memory import SharedBlockMemory, SharedFile, SharedReader
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.planes.ledger import IoLedger, check_posting
from baton.node.errors import PeerLost
from baton.node.host import host_identity
from baton.node.messages.transfer import PlaneAddress

_ADDRESS = re.compile(r"([1-9][0-9]{0,9}):(0|[1-9][0-9]{0,8}):([1-9][0-9]{0,15}):([0-9a-f]{32})", re.ASCII)
"""pid:fd:bytes:nonce."""


class ShmPlane:
    """One end. `memory` may be unmappable for others: this end can then receive, and no peer reaches it."""

    name = "shm"
    pulls = True

    def __init__(self, memory: SharedBlockMemory) -> None:
        self._memory = memory
        self._host = host_identity()
        self._ledger = IoLedger()
        self._addresses: dict[str, PlaneAddress] = {}
        self._readers: dict[str, SharedReader] = {}  # opened at the first receive from each peer

    def describe(self) -> PlaneAddress:
        shared = self._memory.shared
        text = f"{os.getpid()}:{shared.fd}:{shared.size_bytes}:{shared.nonce.hex()}" if shared else ""
        return PlaneAddress(plane=self.name, host=self._host, address=text)

    def reaches(self, peer: PlaneAddress) -> bool:
        """Whether the peer's memory can be opened here, and is what it says."""
        if peer.plane != self.name or peer.host != self._host:
            return False
        try:
            _open(peer).close()
        except PeerLost:
            return False
        return True

    def connect(self, peer: str, address: PlaneAddress) -> None:
        """The memory is mapped when the first chunk is wanted: the sending end never needs it."""
        if self._addresses.get(peer) != address:
            self._unmap(peer)
            self._addresses[peer] = address

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self._memory.num_blocks, blocks)
        self._ledger.end_send(key)

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        check_posting(self._memory.num_blocks, blocks, source)
        self._ledger.post_receive(peer, key, blocks)
        try:
            self._copy(self._reader(peer), source, blocks)
        except PeerLost as error:
            self._ledger.end_receive(key, str(error))
        else:
            self._ledger.end_receive(key)

    def poll(self) -> list[IoDone]:
        return self._ledger.report()

    def cancel(self, transfer_id: bytes) -> None:
        self._ledger.cancel(transfer_id)

    def idle(self, transfer_id: bytes) -> bool:
        """Always: a copy is over when `post_receive` returns."""
        return not self._ledger.receiving(transfer_id)

    def forget(self, peer: str) -> None:
        self._ledger.forget(peer)
        self._unmap(peer)
        self._addresses.pop(peer, None)

    @property
    def pending(self) -> bool:
        return False

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None:
        for peer in list(self._addresses):
            self.forget(peer)
        self._ledger.clear()

    # -- inside

    def _reader(self, peer: str) -> SharedReader:
        reader = self._readers.get(peer)
        if reader is None:
            address = self._addresses.get(peer)
            if address is None:
                raise PeerLost(f"{peer} is not connected")
            reader = self._readers[peer] = _open(address)
        return reader

    def _copy(self, reader: SharedReader, source: Sequence[int], blocks: Sequence[int]) -> None:
        size = self._memory.block_bytes
        for theirs, ours in zip(source, blocks, strict=True):
            self._memory.block(ours)[:] = reader.block(theirs, size)

    def _unmap(self, peer: str) -> None:
        reader = self._readers.pop(peer, None)
        if reader is not None:
            reader.close()


def _open(address: PlaneAddress) -> SharedReader:
    """Map what a peer described; its text is matched strictly, for it comes from another process."""
    match = _ADDRESS.fullmatch(address.address)
    if match is None:
        raise PeerLost(f"no address of shared memory: {address.address[:96]!r}")
    pid, fd, size_bytes, nonce = match.groups()
    return SharedReader(int(pid), SharedFile(int(fd), int(size_bytes), bytes.fromhex(nonce)))
