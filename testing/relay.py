"""A TCP relay on loopback with faults: it stalls, delays, cuts, flips bits, repeats bytes, or refuses connections.

It knows no protocol. A relay lives in one event loop; relay_board.py runs many of them in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum

READ_BYTES = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing resets the connection (RST) instead of ending it in order."""


class FaultKind(StrEnum):
    """What a relay does to the bytes that pass."""

    STALL = "stall"  # they stand still, and go on where they stopped
    DELAY = "delay"  # each piece waits for `amount` seconds
    CUT = "cut"  # connections are reset after `amount` more bytes, new ones too
    FLIP = "flip"  # one bit of a piece is flipped, with the probability `amount`
    REPEAT = "repeat"  # a piece comes twice, with the probability `amount`
    RESET = "reset"  # connections are reset once, new ones work
    REFUSE = "refuse"  # connections are reset, and new ones refused


class Toward(StrEnum):
    """Which direction a fault is in: what stalls in one is a one-way partition."""

    BOTH = "both"
    TARGET = "target"
    DIALER = "dialer"


@dataclass(frozen=True, slots=True)
class LinkFault:
    """One fault of a link."""

    kind: FaultKind
    toward: Toward = Toward.BOTH
    amount: float = 0.0
    """Seconds, bytes or a probability, see FaultKind."""

    def hits(self, toward: Toward) -> bool:
        return self.toward in (Toward.BOTH, toward)


class Relay:
    """Relays connections to `port` of the loopback interface. `num_hits`: pieces that a fault has changed."""

    def __init__(self, port: int, seed: str) -> None:
        self.port = 0
        self.num_hits = 0
        self.num_bytes = 0
        self._target_port = port
        self._random = random.Random(seed)
        self._fault: LinkFault | None = None
        self._left_bytes = 0.0  # until a cut
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.set_fault(LinkFault(FaultKind.RESET))

    def set_fault(self, fault: LinkFault | None) -> None:
        """From now on; None: all passes."""
        self._fault = fault
        self._left_bytes = fault.amount if fault is not None else 0.0
        if fault is not None and fault.kind in (FaultKind.RESET, FaultKind.REFUSE):
            self._reset_all()
        self._changed.set()
        self._changed = asyncio.Event()

    # -- inside

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._fault is not None and self._fault.kind is FaultKind.REFUSE:
            _reset(writer)
            return
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            _reset(writer)
            return
        both = {writer, back_writer}
        self._writers |= both
        pumps = [
            asyncio.create_task(self._pump(reader, back_writer, Toward.TARGET)),
            asyncio.create_task(self._pump(back_reader, writer, Toward.DIALER)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            self._writers -= both
            for each in both:
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, toward: Toward) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(READ_BYTES):
                writer.write(await self._spoil(piece, toward))
                await writer.drain()
                self.num_bytes += len(piece)

    async def _spoil(self, piece: bytes, toward: Toward) -> bytes:
        """What comes out of a piece, and when. Raises OSError where the connection is cut."""
        while (fault := self._fault) is not None and fault.kind is FaultKind.STALL and fault.hits(toward):
            await self._changed.wait()
        if fault is None or not fault.hits(toward):
            return piece
        match fault.kind:
            case FaultKind.DELAY:
                await asyncio.sleep(fault.amount)
            case FaultKind.CUT:
                self._left_bytes -= len(piece)
                if self._left_bytes < 0:
                    self.num_hits += 1
                    self._reset_all()
                    raise ConnectionResetError("cut")
            case FaultKind.FLIP if self._random.random() < fault.amount:
                self.num_hits += 1
                return self._flipped(piece)
            case FaultKind.REPEAT if self._random.random() < fault.amount:
                self.num_hits += 1
                return piece + piece
        return piece

    def _flipped(self, piece: bytes) -> bytes:
        spoilt = bytearray(piece)
        spoilt[self._random.randrange(len(spoilt))] ^= 1 << self._random.randrange(8)
        return bytes(spoilt)

    def _reset_all(self) -> None:
        for writer in self._writers:
            _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
