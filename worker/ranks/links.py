"""Sockets between the ranks of a group, which are processes of one host: pairs of them, inherited when a rank starts.

A socket says at once when its other end has died, and wakes what waits without taking its core. What is exchanged lies
in shared memory; over these links goes a byte that says that it does.
"""

from __future__ import annotations

import contextlib
import os
import socket

from baton.node.errors import PeerLost

MESSAGE_BYTES = 64 << 10


class RankLink:
    """One end of a pair. `other`: the number of the rank, or stage, at the other end. Messages keep their bounds."""

    def __init__(self, other: int, end: socket.socket, kind: str = "rank") -> None:
        self.other, self.name = other, f"{kind} {other}"
        self._end = end

    @classmethod
    def inherited(cls, other: int, fd: int, kind: str = "rank") -> RankLink:
        """The end that the starter of this process has left open for it."""
        return cls(other, socket.socket(fileno=fd), kind)

    def send(self, message: bytes) -> None:
        try:
            self._end.send(message)
        except OSError:
            raise PeerLost(f"{self.name} has ended") from None

    def receive(self, wait_s: float | None) -> bytes:
        """The next message; None waits until the other end is closed."""
        self._end.settimeout(wait_s)
        try:
            message = self._end.recv(MESSAGE_BYTES)
        except TimeoutError:
            raise PeerLost(f"{self.name} has not answered for {wait_s} s") from None
        except OSError:
            message = b""
        if not message:
            raise PeerLost(f"{self.name} has ended")
        return message

    def fileno(self) -> int:
        return self._end.fileno()

    def shut(self) -> None:
        """Nothing more comes or goes; what waits here or at the other end ends. From any thread."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._end.close()


def pair(one: int, other: int, kind: str = "rank") -> tuple[RankLink, RankLink]:
    """The ends of ranks, or of stages, `one` and `other`."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (first, second):
        os.set_inheritable(end.fileno(), False)
    return RankLink(other, first, kind), RankLink(one, second, kind)
