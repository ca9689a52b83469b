"""Links between neighbouring stages: a step's rows and the residual go one way, what was drawn comes back to the first.

A message is a header of a few bytes, a record and the bytes of a tensor. A link says at once when its other end has
died, and `shut` ends what waits at it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import Protocol

from baton.node.errors import PeerLost

_HEADER = struct.Struct("<QQ")
"""Bytes of the record, and behind it."""
MAX_BYTES = 1 << 32
SEND_S = 30.0
"""For the other end to take a message: it reads while it computes."""


class StepLink(Protocol):
    """One end of a link between stages, used by one thread for each direction; `shut` is called by any."""

    def send(self, record: bytes, data: bytes | memoryview = b"") -> None:
        """PeerLost if the other end is gone, or does not take it."""
        ...

    def receive(self, wait_s: float | None = None) -> tuple[bytes, bytearray]:
        """The next message; None waits until the other end is closed, or this one shut: PeerLost."""
        ...

    def shut(self) -> None:
        """Nothing more comes or goes; what waits here or at the other end ends."""
        ...


class StageLink:
    """A StepLink between processes of one host."""

    def __init__(self, name: str, end: socket.socket) -> None:
        """name: of the other end, for errors."""
        self._name, self._end = name, end
        self._sending = threading.Lock()

    @classmethod
    def inherited(cls, name: str, fd: int) -> StageLink:
        """The end that the starter of this process has left open for it."""
        return cls(name, socket.socket(fileno=fd))

    def send(self, record: bytes, data: bytes | memoryview = b"") -> None:
        """PeerLost if the other end is gone, or does not take it."""
        self._end.settimeout(SEND_S)
        try:
            self._end.sendall(_HEADER.pack(len(record), len(data)) + record)
            if len(data):
                self._end.sendall(data)
        except OSError:
            raise PeerLost(f"{self._name} has ended, or takes nothing") from None

    def receive(self, wait_s: float | None = None) -> tuple[bytes, bytearray]:
        """The next message; None waits until the other end is closed, or this one shut."""
        record_bytes, data_bytes = _HEADER.unpack(self._exactly(_HEADER.size, wait_s))
        if record_bytes + data_bytes > MAX_BYTES:
            raise PeerLost(f"{self._name} sends {record_bytes + data_bytes} bytes at once")
        return bytes(self._exactly(record_bytes, SEND_S)), self._exactly(data_bytes, SEND_S)

    def _exactly(self, size: int, wait_s: float | None) -> bytearray:
        received = bytearray(size)
        view = memoryview(received)
        while len(view):
            self._end.settimeout(wait_s)
            try:
                count = self._end.recv_into(view)
            except TimeoutError:
                raise PeerLost(f"{self._name} has not answered for {wait_s} s") from None
            except OSError:
                count = 0
            if not count:
                raise PeerLost(f"{self._name} has ended")
            view = view[count:]
        return received

    def fileno(self) -> int:
        return self._end.fileno()

    def shut(self) -> None:
        """Nothing more comes or goes; what waits here or at the other end ends. From any thread."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._end.close()


def stage_pair(one: int, other: int) -> tuple[StageLink, StageLink]:
    """The ends of stages `one` and `other`."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (first, second):
        os.set_inheritable(end.fileno(), False)
    return StageLink(f"stage {other}", first), StageLink(f"stage {one}", second)
