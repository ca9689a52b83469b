"""A fake of NCCL on CPU for the plane `nccl`: pipes that match sends and receives by order alone, as NCCL does.

Calls on which NCCL would hang or write out of bounds are recorded in `violations`: a different order, a different size,
a use after an abort.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.pipe import Pieces, PipeState


@dataclass
class Fabric:
    """Connects the pipes of all connectors. `frozen`: no operation ends. `abort_asks`: polls that an abort takes."""

    frozen: bool = False
    abort_asks: int = 0
    pairs: dict[bytes, Pair] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


@dataclass
class Pair:
    sends: list[FakeOperation] = field(default_factory=list)
    receives: list[FakeOperation] = field(default_factory=list)


class FakeOperation:
    def __init__(self, fabric: Fabric, pair: Pair, memory: HostMemory, pieces: Pieces, packed: bool) -> None:
        self.memory = memory
        self.pieces = list(pieces)
        self.packed = packed
        self.moved = False
        self._fabric = fabric
        self._pair = pair

    @property
    def sizes(self) -> list[int]:
        sizes = [length * self.memory.block_bytes for _, length in self.pieces]
        return [sum(sizes)] if self.packed else sizes

    @property
    def done(self) -> bool:
        pair = self._pair
        for send, receive in zip(pair.sends, pair.receives, strict=False):
            if not send.moved and not self._fabric.frozen:
                self._move(send, receive)
        return self.moved

    def _move(self, send: FakeOperation, receive: FakeOperation) -> None:
        if send.sizes != receive.sizes:
            self._fabric.violations.append(f"a send of {send.sizes} meets a receive of {receive.sizes}")
        data = b"".join(bytes(send.memory.block(first + i)) for first, length in send.pieces for i in range(length))
        size = receive.memory.block_bytes
        targets = [first + i for first, length in receive.pieces for i in range(length)]
        for number, block in enumerate(targets):
            receive.memory.block(block)[:] = data[number * size : (number + 1) * size]
        send.moved = receive.moved = True


class FakePipe:
    def __init__(self, fabric: Fabric, memory: HostMemory, sending: bool, tell: Callable[[str, bytes], None]) -> None:
        self.state = PipeState.OPENING
        self.reason = ""
        self._fabric = fabric
        self._memory = memory
        self._sending = sending
        self._pair: Pair | None = None
        self._tell = tell
        self._asks = 0
        if sending:
            name = secrets.token_bytes(8)
            self._pair = fabric.pairs[name] = Pair()
            tell("id", name)

    def deliver(self, key: str, value: bytes) -> None:
        if key == "id":
            self._pair = self._fabric.pairs[value]
            self._tell("here", b"")
        if self.state is PipeState.OPENING:
            self.state = PipeState.READY

    def send(self, pieces: Pieces, packed: bool) -> FakeOperation:
        return self._post(pieces, packed)

    def receive(self, pieces: Pieces, packed: bool) -> FakeOperation:
        return self._post(pieces, packed)

    def abort(self) -> None:
        self.state = PipeState.BROKEN

    @property
    def stopped(self) -> bool:
        self._asks += 1
        return self.state is PipeState.BROKEN and self._asks > self._fabric.abort_asks

    def _post(self, pieces: Pieces, packed: bool) -> FakeOperation:
        assert self._pair is not None
        if self.state is not PipeState.READY:
            self._fabric.violations.append("a movement on an aborted pipe")
        operation = FakeOperation(self._fabric, self._pair, self._memory, pieces, packed)
        (self._pair.sends if self._sending else self._pair.receives).append(operation)
        return operation


class FakeConnector:
    def __init__(self, fabric: Fabric, memory: HostMemory, device: str) -> None:
        self.fabric = fabric
        self.memory = memory
        self.device = device
        self.num_blocks = memory.num_blocks
        self.block_bytes = memory.block_bytes

    def open(self, sending: bool, tell: Callable[[str, bytes], None]) -> FakePipe:
        return FakePipe(self.fabric, self.memory, sending, tell)

    def close(self, patience_s: float) -> None:
        """Does nothing: the fake has no threads."""
