"""The link of a step's way between processes that share no memory: parcels through the thread that has the sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from baton.node.errors import PeerLost

SendParcel = Callable[[bytes, bytes | memoryview], None]


class ParcelLink:
    """worker.stages.links.StepLink; `deliver` and `shut` may be called by any thread."""

    def __init__(self, name: str, send: SendParcel) -> None:
        """name: of the other end, for errors."""
        self._name, self._send = name, send
        self._parcels: SimpleQueue[tuple[bytes, bytearray] | PeerLost] = SimpleQueue()
        self._ended, self._reason = threading.Event(), ""

    def deliver(self, record: bytes, data: bytearray) -> None:
        self._parcels.put((record, data))

    def send(self, record: bytes, data: bytes | memoryview = b"") -> None:
        if self._ended.is_set():
            raise PeerLost(f"{self._name} {self._reason}")
        self._send(record, data)

    def receive(self, wait_s: float | None = None) -> tuple[bytes, bytearray]:
        try:
            parcel = self._parcels.get(timeout=wait_s)
        except Empty:
            raise PeerLost(f"{self._name} has not answered for {wait_s} s") from None
        if isinstance(parcel, PeerLost):
            self._parcels.put(parcel)
            raise parcel
        return parcel

    def shut(self, reason: str = "has ended") -> None:
        self._reason = reason
        self._ended.set()
        self._parcels.put(PeerLost(f"{self._name} {reason}"))
