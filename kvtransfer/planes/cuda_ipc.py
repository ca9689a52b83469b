"""The data plane between two GPUs of one host: the receiver maps the sender's pool and pulls with the copy engine.

It pulls: the receiver copies on a side stream that no kernel shares, the sender does nothing, and no multiprocessor
moves a byte; the receiver's read once what has come, for its digest. A mapping outlives the death of its owner, and a
copy then succeeds with old bytes (measured), so the protocol asks the sender afterwards if its lease held. A copy that
was started cannot be stopped: a cancelled transfer is idle when its copies and digests are over, and a mapping is
closed when no copy reads it.

The plane itself touches no GPU: `PullEngine` does, and a fake one passes the same contract.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from baton.kvtransfer.blocks.runs import BlockRun, RowSpacing, common_runs
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.planes.ledger import IoLedger, check_posting
from baton.node.errors import PeerLost
from baton.node.host import host_identity
from baton.node.messages.transfer import PlaneAddress
from baton.node.telemetry import log_event

logger = logging.getLogger("kvtransfer.cuda_ipc")

_ADDRESS = re.compile(
    r"([0-9a-f]{128}):([1-9][0-9]{0,15}):([0-9a-f]{32}):([0-9a-f]{32})(?::([1-9][0-9]{0,5}):([1-9][0-9]{0,15}))?",
    re.ASCII,
)
"""handle:bytes:nonce:device, and :rows:bytes of a group, where rows have gaps. Rows have one size at both ends."""


class Exported(NamedTuple):
    """A pool as another process opens it."""

    handle: bytes
    """64 bytes, cudaIpcMemHandle_t."""
    size_bytes: int
    """Of the blocks; the nonce lies behind them."""
    nonce: bytes
    device_uuid: str
    """32 hex digits."""
    rows: RowSpacing


class PullEngine(Protocol):
    """What maps and copies. All calls come from one thread; none waits for the GPU, but for `open` and `close`."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def rows(self) -> RowSpacing:
        """Where the blocks lie: as rows of the local pool."""
        ...

    def export(self) -> Exported: ...

    def open(self, exported: Exported) -> int:
        """A pointer to the peer's block 0. Raises PeerLost if it cannot be mapped, or is not what was described."""
        ...

    def close(self, pointer: int) -> None: ...

    def pull(self, pointer: int, runs: Sequence[BlockRun], blocks: Sequence[int]) -> int:
        """Begin to copy these runs of bytes from the peer's pool, which fill these blocks; the number names the copy.
        Raises PeerLost."""
        ...

    def ended(self, copy: int) -> bytes | None:
        """None until it is over, then, once, the checksums of the units it has written, in order, empty if none were
        made. Raises PeerLost if it failed."""
        ...

    def shut(self) -> None:
        """Wait for all copies (bounded by their size) and free everything."""
        ...


@dataclass(slots=True)
class _Mapping:
    address: str
    exported: Exported
    pointer: int
    copies: int = 0
    wanted: bool = True


@dataclass(slots=True)
class _Pull:
    key: ChunkKey
    mapping: _Mapping
    copy: int


@dataclass(slots=True)
class _Peer:
    address: PlaneAddress
    mapping: _Mapping | None = None


@dataclass(slots=True)
class _Mappings:
    """Those that are open. One that `reaches` opened waits here for the `connect` that follows."""

    probed: _Mapping | None = None
    unwanted: list[_Mapping] = field(default_factory=list)


class CudaIpcPlane:
    """One end; `engine` knows the local pool."""

    name = "cuda_ipc"
    pulls = True

    def __init__(self, engine: PullEngine) -> None:
        self._engine = engine
        self._host = host_identity()
        self._ledger = IoLedger()
        self._peers: dict[str, _Peer] = {}
        self._pulls: list[_Pull] = []
        self._mappings = _Mappings()

    def describe(self) -> PlaneAddress:
        own = self._engine.export()
        text = f"{own.handle.hex()}:{own.size_bytes}:{own.nonce.hex()}:{own.device_uuid}"
        if own.rows.has_gaps:
            text += f":{own.rows.group_rows}:{own.rows.group_bytes}"
        return PlaneAddress(plane=self.name, host=self._host, address=text)

    def reaches(self, peer: PlaneAddress) -> bool:
        """Whether the peer's pool can be mapped here; a pool that was never seen is mapped to find out."""
        if peer.plane != self.name or peer.host != self._host:
            return False
        known = any(each.mapping and each.mapping.address == peer.address for each in self._peers.values())
        if known or (self._mappings.probed and self._mappings.probed.address == peer.address):
            return True
        try:
            mapping = self._open(peer)
        except PeerLost as error:
            log_event(logger, "plane_unreachable", plane=self.name, reason=str(error))
            return False
        self._drop_probed()
        self._mappings.probed = mapping
        return True

    def connect(self, peer: str, address: PlaneAddress) -> None:
        """The pool is mapped when the first chunk is wanted, or was by `reaches`: the sending end never needs it."""
        known = self._peers.get(peer)
        if known is not None and known.address == address:
            return
        if known is not None:
            self._drop(known.mapping)
        probed = self._mappings.probed
        self._peers[peer] = _Peer(address)
        if probed is not None and probed.address == address.address:
            self._peers[peer].mapping, self._mappings.probed = probed, None
        log_event(logger, "plane_connected", plane=self.name, peer=peer)

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self._engine.num_blocks, blocks)
        self._ledger.end_send(key)

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        check_posting(self._engine.num_blocks, blocks, source)
        self._ledger.post_receive(peer, key, blocks)
        try:
            mapping = self._mapping(peer)
            runs = self._runs(mapping.exported, source, blocks)
            self._pulls.append(_Pull(key, mapping, self._engine.pull(mapping.pointer, runs, blocks)))
            mapping.copies += 1
        except PeerLost as error:
            self._ledger.end_receive(key, str(error))

    def poll(self) -> list[IoDone]:
        self._pulls = [pull for pull in self._pulls if not self._settle(pull)]
        for mapping in [each for each in self._mappings.unwanted if not each.copies]:
            self._mappings.unwanted.remove(mapping)
            self._engine.close(mapping.pointer)
        return self._ledger.report()

    def cancel(self, transfer_id: bytes) -> None:
        self._ledger.cancel(transfer_id)

    def idle(self, transfer_id: bytes) -> bool:
        """Whether no copy of this transfer is under way; one that is says so by `pending`, and ends by itself."""
        return not any(pull.key.transfer_id == transfer_id for pull in self._pulls)

    def forget(self, peer: str) -> None:
        """Copies that are under way fail, once they are over; then the mapping is closed."""
        known = self._peers.pop(peer, None)
        if known is not None:
            self._drop(known.mapping)

    @property
    def pending(self) -> bool:
        return bool(self._pulls or self._mappings.unwanted)

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None:
        """Waits for the copies that are under way: milliseconds."""
        for peer in list(self._peers):
            self.forget(peer)
        self._drop_probed()
        self._engine.shut()
        self._ledger.clear()
        self._pulls.clear()
        self._mappings.unwanted.clear()

    # -- inside

    def _runs(self, peer: Exported, source: Sequence[int], blocks: Sequence[int]) -> list[BlockRun]:
        """Of bytes."""
        if max(source) >= peer.rows.num_rows(peer.size_bytes) or min(source) < 0:
            raise PeerLost(f"the peer's pool of {peer.size_bytes} bytes has no block {max(source)}")
        size = self._engine.rows.row_bytes
        runs = common_runs(peer.rows.places(source), self._engine.rows.places(blocks), size)
        return [BlockRun(run.source, run.target, run.length * size) for run in runs]

    def _mapping(self, peer: str) -> _Mapping:
        known = self._peers.get(peer)
        if known is None:
            raise PeerLost(f"{peer} is not connected")
        if known.mapping is None:
            known.mapping = self._open(known.address)
        return known.mapping

    def _open(self, address: PlaneAddress) -> _Mapping:
        """Map what a peer described; its text is matched strictly, for it comes from another process."""
        match = _ADDRESS.fullmatch(address.address)
        if match is None:
            raise PeerLost(f"no address of device memory: {address.address[:96]!r}")
        handle, size_bytes, nonce, device_uuid, group_rows, group_bytes = match.groups()
        rows = RowSpacing.even(self._engine.rows.row_bytes)
        if group_rows is not None:
            rows = rows._replace(group_rows=int(group_rows), group_bytes=int(group_bytes))
        if rows.group_rows * rows.row_bytes > rows.group_bytes:
            raise PeerLost(f"{rows.group_bytes} bytes do not hold {rows.group_rows} rows of {rows.row_bytes}")
        exported = Exported(bytes.fromhex(handle), int(size_bytes), bytes.fromhex(nonce), device_uuid, rows)
        if exported.nonce == self._engine.export().nonce:
            raise PeerLost("this is our own pool")
        return _Mapping(address.address, exported, self._engine.open(exported))

    def _settle(self, pull: _Pull) -> bool:
        """Report the copy if it is over; whether it is."""
        reason, sums = "" if pull.mapping.wanted else "the peer is gone", b""
        try:
            ended = self._engine.ended(pull.copy)
            if ended is None:
                return False
            sums = ended
        except PeerLost as error:
            reason = str(error)
        pull.mapping.copies -= 1
        if self._ledger.receive(pull.key) is not None:  # else it was cancelled
            self._ledger.end_receive(pull.key, reason, sums)
        return True

    def _drop(self, mapping: _Mapping | None) -> None:
        if mapping is not None:
            mapping.wanted = False
            self._mappings.unwanted.append(mapping)

    def _drop_probed(self) -> None:
        probed, self._mappings.probed = self._mappings.probed, None
        self._drop(probed)
